"""Links that are slow or cut between two hosts, hosts that are gone, and jobs that go on with those that are left."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import transformers
from cluster import TIMEOUT, ZERO2, Cluster, Interrupted, assert_goes_on, assert_same, flags, one_host, resume, script
from hosts import SlowLink, joined_hosts

from rose_ds.experiments.models import load_tokenizer

pytestmark = pytest.mark.timeout(1500)  # a dozen launches


# --- slow links ---


@pytest.fixture(scope="module")
def tiny(cluster: Cluster, minilm: str) -> Path:
    """A model whose gradient is a megabyte: 1% of loss leaves a TCP connection a few megabits a second."""
    folder = cluster.folder / "tiny"
    tokenizer = load_tokenizer(minilm)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"intermediate_size": 16, "max_position_embeddings": 64},
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_two_host_slow_link(cluster: Cluster, tiny: Path, tmp_path: Path) -> None:
    """20 ms each way, 1% of frames lost, 100 Mbit/s: the same losses, thresholds and weights, later."""
    if (reason := SlowLink.why_not()) is not None:
        pytest.skip(f"no slow link can be made here: {reason}")
    common = {"RENDEZVOUS": "node1:29400", "JOB": "slow"}
    seconds = {}
    with joined_hosts(tmp_path, link=SlowLink(delay_ms=20, loss=0.01, rate_mbit=100)) as hosts:
        far = Cluster(hosts, cluster.folder, str(tiny), cluster.env)
        for name, nodes in (("near", 1), ("far", 2)):
            told = [*script("torchrun_node.sh"), *flags(far, name)]
            env = {**common, "NODES": str(nodes), "RANKS_PER_NODE": str(2 // nodes)}
            far.run(name, *[(told, env)] * nodes)
            seconds[name] = json.loads((cluster.output(name) / "metrics.json").read_text())["train_seconds"]
    assert_same(cluster.output("near"), cluster.output("far"), "ddp")
    print(f"training took {seconds['near']:.1f} s on one host, {seconds['far']:.1f} s over the slow link")
    assert seconds["far"] > seconds["near"] + 1  # each of four steps waits for dozens of round trips of 40 ms


# --- faults between hosts ---


@pytest.mark.parametrize("seconds", [5, 65])
def test_two_host_link_comes_back(cluster: Cluster, seconds: int) -> None:
    """A cut that ends before the timeouts costs its time and nothing else; the rendezvous' own is 60 s by default."""
    name = f"cut-{seconds}"
    with Interrupted(cluster, name, [], {"RDZV_CONF": "read_timeout=600"} if seconds > 60 else {}) as job:
        cluster.hosts[1].cable("down")
        job.go()
        time.sleep(seconds)
        assert all(process.poll() is None for process in job.processes), job.text()[-6000:]
        cluster.hosts[1].cable("up")
        codes = [process.wait(TIMEOUT) for process in job.processes]
        assert codes == [0, 0], job.text()[-6000:]
    assert_same(one_host(cluster, "ddp"), cluster.output(name), "ddp")


def test_two_host_link_stays_cut(cluster: Cluster) -> None:
    """The ranks of both hosts end soon after the process group's timeout, and say why; resumed, nothing is lost.

    Under ZeRO-2, as DeepSpeed makes process groups of its own. torchrun itself ends where the rendezvous is. On the
    other host it reads from the rendezvous' store without a limit, until the link is back or TCP gives up.
    """
    name = "lost"
    with Interrupted(cluster, name, [*ZERO2, "--ddp_timeout", "20"]) as job:
        cluster.hosts[1].cable("down")
        job.go()
        begin = time.monotonic()
        while not all("RankLost: another rank did not take part" in log.read_text() for log in job.logs):
            assert time.monotonic() < begin + 100, job.text()[-6000:]
            time.sleep(0.2)
        told = time.monotonic() - begin
        assert job.processes[0].wait(100) != 0
        print(
            f"both ranks said so {told:.0f} s after the cut, the first launcher ended after "
            f"{time.monotonic() - begin:.0f} s"
        )
        cluster.hosts[1].cable("up")
        assert job.processes[1].wait(150) != 0
    resume(cluster, name, ZERO2, nodes=2)
    assert_same(one_host(cluster, "zero2"), cluster.output(name), "zero2")


# --- jobs that start again by themselves ---

ELASTIC = {"RESTARTS": "2", "NODES": "1:2", "RDZV_CONF": "last_call_timeout=5"}


def test_two_host_elastic_rank(cluster: Cluster) -> None:
    """A rank is killed: the launchers of both hosts start theirs anew, and the end is that of a run without a fault."""
    name = "elastic-rank"
    with Interrupted(cluster, name, ["--resume", "auto", "--ddp_timeout", "20"], ELASTIC) as job:
        (victim,) = [process for process in cluster.hosts[1].processes() if "RANK" in process.environ()]
        victim.kill()
        job.go()
        codes = [process.wait(TIMEOUT) for process in job.processes]
        assert codes == [0, 0], job.text()[-6000:]
        assert "resuming from" in job.text() and "checkpoint-2" in job.text()
    assert_same(one_host(cluster, "ddp"), cluster.output(name), "ddp")


def test_two_host_elastic_host(cluster: Cluster, tmp_path: Path) -> None:
    """A host is gone for good: the launcher that is left goes on with one rank, and as many rows to a step."""
    name = "elastic-host"
    with joined_hosts(tmp_path) as hosts:
        fragile = Cluster(hosts, cluster.folder, cluster.model, cluster.env, cluster.runs)
        told = ["--resume", "auto", "--ddp_timeout", "20", "--global_batch_size", "8"]
        with Interrupted(fragile, name, told, ELASTIC) as job:
            hosts[1].kill()
            job.go()
            begin = time.monotonic()
            assert job.processes[0].wait(TIMEOUT) == 0, job.text()[-6000:]
            print(f"the host that was left was done {time.monotonic() - begin:.0f} s after the other one was gone")
        assert "resuming on 1 ranks from a checkpoint of 2" in job.text()
    metrics = json.loads((cluster.output(name) / "metrics.json").read_text())
    assert (metrics["world_size"], metrics["steps"]) == (1, 4)
    assert_goes_on(one_host(cluster, "ddp"), cluster.output(name))
