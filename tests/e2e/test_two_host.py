"""Training across two hosts: every launch script, the same thresholds, losses and weights as two ranks of one host."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from hosts import BIN, ROOT, Host, SlowLink, two_hosts, why_not
from safetensors.torch import load_file

from rose_ds.experiments.models import load_tokenizer

_REASON = why_not()
pytestmark = [
    pytest.mark.timeout(1500),  # twelve launches
    pytest.mark.skipif(_REASON is not None, reason=f"two hosts cannot be made here: {_REASON}"),
]

FLAGS = ["--task", "snippets", "--model", "minilm", "--max_steps", "4", "--save_steps", "4", "--logging_steps", "1"]
FLAGS += ["--max_train_samples", "64", "--max_eval_samples", "8", "--max_length", "32", "--learning_rate", "1e-4"]
FLAGS += ["--per_device_train_batch_size", "4", "--disable_tqdm", "true", "--report_to", "none"]
ZERO2 = ["--deepspeed", "ds_configs/zero2.json"]
TIMEOUT = 240

#: What a rank needs to know on a host; ssh carries nothing over.
VARIABLES = {
    "PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", ""), "/usr/sbin"]),
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "100",
}


@dataclass
class Cluster:
    """Two hosts, and what was run on them."""

    hosts: tuple[Host, Host]
    folder: Path
    env: dict[str, str]
    runs: dict[str, Path] = field(default_factory=dict)
    """output_dir by name, of runs that several tests compare with."""

    def start(self, name: str, command: list[str], at: int = 0, **env: str) -> tuple[subprocess.Popen[bytes], Path]:
        """Start a command on a host; the log is its own."""
        log = self.folder / f"{name}-node{at + 1}.log"
        return self.hosts[at].start(command, log, {**self.env, **env}), log

    def run(self, name: str, *commands: tuple[list[str], dict[str, str]], timeout: float = TIMEOUT) -> str:
        """Run the n-th command on the n-th host, all at once, to their end, and return what they printed."""
        started = [self.start(name, command, at, **env) for at, (command, env) in enumerate(commands)]
        deadline = time.monotonic() + timeout
        try:
            codes = [process.wait(max(deadline - time.monotonic(), 1)) for process, _ in started]
        finally:
            self.stop([process for process, _ in started])
            text = "\n".join(log.read_text(errors="replace") for _, log in started)
        assert codes == [0] * len(commands), text[-8000:]
        return text

    def stop(self, processes: list[subprocess.Popen[bytes]]) -> None:
        """Leave nothing running on the hosts."""
        for host in self.hosts:
            host.sweep()
        for process in processes:
            process.kill()
            process.wait()

    def output(self, name: str) -> Path:
        return self.folder / "runs" / name


@pytest.fixture(scope="module")
def cluster(
    minilm: str, snippets: str, extensions: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("two_host")
    (folder / "hosts").mkdir()
    env = {**VARIABLES, "TORCH_EXTENSIONS_DIR": str(extensions), "HOSTFILE": str(folder / "hostfile")}
    (folder / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    (folder / "deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in env.items()))
    with two_hosts(folder / "hosts") as hosts:
        yield Cluster(hosts, folder, {**env, "DS_ENV_FILE": str(folder / "deepspeed_env")})
    shutil.rmtree(folder)


def script(name: str) -> list[str]:
    return ["bash", f"launch/cluster/{name}"]


def accelerate_config(folder: Path) -> Path:
    """The multi-host config, made to run on CPUs."""
    path = folder / "fsdp2_nodes.yaml"
    config = yaml.safe_load((ROOT / "ds_configs" / "fsdp2_nodes.yaml").read_text())
    path.write_text(yaml.safe_dump({**config, "use_cpu": True}))
    return path


def flags(cluster: Cluster, name: str) -> list[str]:
    return [*FLAGS, "--output_dir", str(cluster.output(name))]


def fsdp_variables(cluster: Cluster) -> dict[str, str]:
    config = str(accelerate_config(cluster.folder))
    return {"CONFIG": config, "PROGRAM": "tests/e2e/scripts/cpu_fsdp.py rose_ds"}


def one_host(cluster: Cluster, engine: str) -> Path:
    """output_dir of the run with both ranks on node1."""
    name = f"one-{engine}"
    if name not in cluster.runs:
        told = flags(cluster, name)
        command, env = {
            "ddp": (
                [*script("torchrun_node.sh"), *told],
                {"NODES": "1", "RANKS_PER_NODE": "2", "RENDEZVOUS": "node1:29400", "JOB": name},
            ),
            "zero2": ([str(BIN / "deepspeed"), "--num_gpus", "2", "launch/train.py", *ZERO2, *told], {}),
            "fsdp2": (
                [*script("accelerate_node.sh"), *told],
                {"NODES": "1", "RANKS": "2", "NODE_RANK": "0", "MASTER_ADDR": "node1", **fsdp_variables(cluster)},
            ),
        }[engine]
        cluster.run(name, (command, env))
        cluster.runs[name] = cluster.output(name)
    return cluster.runs[name]


def history(output_dir: Path) -> list[dict[str, Any]]:
    state = json.loads((output_dir / "checkpoint-4" / "trainer_state.json").read_text())
    entries: list[dict[str, Any]] = state["log_history"]
    return entries


def assert_same(one: Path, two: Path, engine: str) -> None:
    """Losses, thresholds and weights, to the last bit."""
    expected, found = history(one), history(two)
    assert [entry["step"] for entry in expected] == [1, 2, 3, 4]
    assert all({"loss", "rose/tau_first", "rose/tau_second"} <= set(entry) for entry in expected), expected[0]
    assert found == expected
    assert len({entry["rose/tau_first"] for entry in found}) == 4
    weights = [load_file(folder / "model.safetensors") for folder in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    metrics = json.loads((two / "metrics.json").read_text())
    assert (metrics["engine"], metrics["world_size"], metrics["steps"]) == (engine, 2, 4)


def test_two_host_doctor(cluster: Cluster) -> None:
    common = {"NODES": "2", "RANKS_PER_NODE": "1", "RENDEZVOUS": "node1:29400", "JOB": "doctor", "COMMAND": "doctor"}
    command = [*script("torchrun_node.sh"), "--json", "--output_dir", str(cluster.folder)]
    text = cluster.run("doctor", (command, common), (command, common))
    line = next(line for line in text.splitlines() if line.startswith('{"ok"'))
    checks = {check["check"]: check for check in json.loads(line)["checks"]}
    assert checks["same versions"]["text"] == "on all 2 ranks, 2 host names"
    assert "the same bits on 2 ranks" in checks["threshold gloo"]["text"]
    assert checks["shared output"]["status"] == "ok"


def test_two_host_torchrun(cluster: Cluster) -> None:
    common = {"NODES": "2", "RANKS_PER_NODE": "1", "RENDEZVOUS": "node1:29400", "JOB": "torchrun"}
    command = [*script("torchrun_node.sh"), *flags(cluster, "torchrun")]
    cluster.run("torchrun", (command, common), (command, common))
    assert_same(one_host(cluster, "ddp"), cluster.output("torchrun"), "ddp")


def test_two_host_accelerate(cluster: Cluster) -> None:
    common = {"NODES": "2", "RANKS": "2", "MASTER_ADDR": "node1", **fsdp_variables(cluster)}
    command = [*script("accelerate_node.sh"), *flags(cluster, "accelerate")]
    cluster.run("accelerate", *((command, {**common, "NODE_RANK": str(i)}) for i in range(2)))
    assert_same(one_host(cluster, "fsdp2"), cluster.output("accelerate"), "fsdp2")


def test_two_host_deepspeed_no_ssh(cluster: Cluster) -> None:
    command = [*script("deepspeed_node.sh"), *ZERO2, *flags(cluster, "no_ssh")]
    cluster.run("no_ssh", *((command, {"NODE_RANK": str(i)}) for i in range(2)))
    assert_same(one_host(cluster, "zero2"), cluster.output("no_ssh"), "zero2")


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="apt install pdsh")
def test_two_host_deepspeed_pdsh(cluster: Cluster) -> None:
    text = cluster.run("pdsh", ([*script("deepspeed_pdsh.sh"), *ZERO2, *flags(cluster, "pdsh")], {}))
    assert "node1: " in text and "node2: " in text
    assert_same(one_host(cluster, "zero2"), cluster.output("pdsh"), "zero2")


# --- Slurm's scripts, under a Slurm that starts tasks on the two hosts ---


def slurm(cluster: Cluster, name: str) -> dict[str, str]:
    """Variables under which srun, sbatch, scancel and scontrol are the stubs."""
    folder = cluster.folder / f"slurm-{name}"
    (folder / "bin").mkdir(parents=True)
    stub = ROOT / "tests" / "e2e" / "scripts" / "slurm_stub.py"
    for program in ("sbatch", "srun", "scancel", "scontrol"):
        path = folder / "bin" / program
        path.write_text(f"#!{BIN / 'python'}\n" + stub.read_text())
        path.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}{os.pathsep}{cluster.env['PATH']}", "SLURM_STUB": str(folder)}


def test_two_host_slurm_deepspeed(cluster: Cluster) -> None:
    command = ["sbatch", "--gpus-per-node=1", "launch/slurm/deepspeed.sbatch", *ZERO2, *flags(cluster, "slurm-zero2")]
    cluster.run("slurm-zero2", (command, slurm(cluster, "zero2")))
    assert_same(one_host(cluster, "zero2"), cluster.output("slurm-zero2"), "zero2")
    assert not (cluster.folder / "slurm-zero2" / "requeued").exists()


def test_two_host_slurm_fsdp(cluster: Cluster) -> None:
    command = ["sbatch", "--gpus-per-node=1", "launch/slurm/fsdp.sbatch", *flags(cluster, "slurm-fsdp2")]
    cluster.run("slurm-fsdp2", (command, {**slurm(cluster, "fsdp2"), **fsdp_variables(cluster)}))
    assert_same(one_host(cluster, "fsdp2"), cluster.output("slurm-fsdp2"), "fsdp2")


def test_two_host_slurm_preemption(cluster: Cluster) -> None:
    """SIGTERM to the batch script: a checkpoint, back into the queue, and the run goes on as if nothing had been."""
    name = "slurm-preempted"
    out = cluster.folder / "pauses"
    out.mkdir()
    env = {**slurm(cluster, "preempted"), "PROGRAM": "tests/e2e/scripts/faulty.py"}
    command = ["sbatch", "--gpus-per-node=1", "launch/slurm/deepspeed.sbatch", *ZERO2, *flags(cluster, name)]
    process, log = cluster.start(name, command, **env, FAULTS=json.dumps({"pause": 1, "out": str(out)}))
    try:
        deadline = time.monotonic() + TIMEOUT
        while len(list(out.glob("pausing-*"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-6000:]
            time.sleep(0.05)
        signal_batch_script(cluster.hosts[0], "deepspeed.sbatch")
        time.sleep(5)  # scancel reaches both hosts through ssh
        (out / "go").touch()
        code = process.wait(TIMEOUT)
    finally:
        cluster.stop([process])
    text = log.read_text()
    assert code != 0
    assert "SIGTERM received: checkpoint saved at step 2" in text, text[-6000:]
    assert (cluster.folder / name / "requeued").read_text() == "4711\n"
    assert not (cluster.output(name) / "metrics.json").exists()
    restarted = {**env, "SLURM_RESTART_COUNT": "1", "FAULTS": json.dumps({"out": str(out)})}
    cluster.run(name, (command, restarted))
    assert_same(one_host(cluster, "zero2"), cluster.output(name), "zero2")


def signal_batch_script(host: Host, script: str) -> None:
    """SIGTERM to the job's shell alone, as --signal=B: and a preemption send it."""
    shells = [
        process
        for process in host.processes()
        if process.name() == "bash" and any(argument.endswith(script) for argument in process.cmdline())
    ]
    assert len(shells) == 1, shells
    shells[0].terminate()


def test_two_host_kubeflow_command(cluster: Cluster) -> None:
    """The manifest's command on each host, with the variables that the operator sets in each pod."""
    manifest = yaml.safe_load((ROOT / "launch" / "kubernetes" / "pytorchjob.yaml").read_text())
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    nodes = sum(replica["replicas"] for replica in replicas.values())
    assert nodes == 2
    jobs = []
    for at, replica in enumerate(replicas[kind] for kind in ("Master", "Worker")):
        (container,) = replica["template"]["spec"]["containers"]
        # argparse takes the last of a flag
        told = [*container["command"], *container["args"], *ZERO2, *flags(cluster, "kubeflow")]
        operator = {"PET_NNODES": str(nodes), "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": str(at)}
        operator |= {"PET_MASTER_ADDR": "node1", "PET_MASTER_PORT": "23456"}
        jobs.append((told, {**operator, **{v["name"]: v["value"] for v in container["env"]}}))
    cluster.run("kubeflow", *jobs)
    assert_same(one_host(cluster, "zero2"), cluster.output("kubeflow"), "zero2")


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


@pytest.mark.skipif(SlowLink.why_not() is not None, reason=f"no slow link can be made here: {SlowLink.why_not()}")
def test_two_host_slow_link(cluster: Cluster, tiny: Path, tmp_path: Path) -> None:
    """20 ms each way, 1% of frames lost, 100 Mbit/s: the same losses, thresholds and weights, later."""
    command = [*script("torchrun_node.sh"), *FLAGS, "--model", str(tiny)]
    common = {"RENDEZVOUS": "node1:29400", "JOB": "slow"}
    seconds = {}
    with two_hosts(tmp_path, SlowLink(delay_ms=20, loss=0.01, rate_mbit=100)) as hosts:
        far = Cluster(hosts, cluster.folder, cluster.env)
        for name, nodes in (("near", 1), ("far", 2)):
            told = [*command, "--output_dir", str(cluster.output(name))]
            env = {**common, "NODES": str(nodes), "RANKS_PER_NODE": str(2 // nodes)}
            far.run(name, *[(told, env)] * nodes)
            seconds[name] = json.loads((cluster.output(name) / "metrics.json").read_text())["train_seconds"]
    assert_same(cluster.output("near"), cluster.output("far"), "ddp")
    print(f"training took {seconds['near']:.1f} s on one host, {seconds['far']:.1f} s over the slow link")
    assert seconds["far"] > seconds["near"] + 1  # each of four steps waits for dozens of round trips of 40 ms


# --- faults between hosts ---

FAULTY = {"NODES": "2", "RANKS_PER_NODE": "1", "RENDEZVOUS": "node1:29400", "PROGRAM": "tests/e2e/scripts/faulty.py"}


@dataclass
class Interrupted:
    """A job whose ranks all wait in their fourth step, with a checkpoint after the second."""

    cluster: Cluster
    name: str
    flags: list[str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    logs: list[Path] = field(default_factory=list)

    def __enter__(self) -> Interrupted:
        out = self.cluster.folder / f"out-{self.name}"
        out.mkdir()
        env = {**FAULTY, "JOB": self.name, "FAULTS": json.dumps({"pause": 3, "out": str(out)})}
        told = [*script("torchrun_node.sh"), *self.flags, *flags(self.cluster, self.name), "--save_steps", "2"]
        for at in range(2):
            process, log = self.cluster.start(self.name, told, at, **env)
            self.processes.append(process)
            self.logs.append(log)
        deadline = time.monotonic() + TIMEOUT
        while len(list(out.glob("pausing-*"))) < 2:
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                self.cluster.stop(self.processes)
                raise AssertionError(self.text()[-6000:])
            time.sleep(0.05)
        return self

    def go(self) -> None:
        (self.cluster.folder / f"out-{self.name}" / "go").touch()

    def text(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    def __exit__(self, *_: object) -> None:
        self.cluster.stop(self.processes)
        for host in self.cluster.hosts:
            if host.init.is_running():
                host.cable("up")


@pytest.mark.parametrize("seconds", [5, 40])
def test_two_host_link_comes_back(cluster: Cluster, seconds: int) -> None:
    """A cut that ends before the timeout changes nothing but the time."""
    name = f"cut-{seconds}"
    with Interrupted(cluster, name, []) as job:
        cluster.hosts[1].cable("down")
        job.go()
        time.sleep(seconds)
        assert all(process.poll() is None for process in job.processes), job.text()[-6000:]
        cluster.hosts[1].cable("up")
        codes = [process.wait(TIMEOUT) for process in job.processes]
        assert codes == [0, 0], job.text()[-6000:]
    assert_same(one_host(cluster, "ddp"), cluster.output(name), "ddp")


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_two_host_link_stays_cut(cluster: Cluster, engine: str) -> None:
    """The ranks of both hosts end soon after the process group's timeout, and say why; resumed, nothing is lost.

    torchrun itself ends where the rendezvous is. On the other host it reads from the rendezvous' store without a limit,
    until the link is back or TCP gives up.
    """
    name, more = f"lost-{engine}", ZERO2 if engine == "zero2" else []
    with Interrupted(cluster, name, [*more, "--ddp_timeout", "20"]) as job:
        cluster.hosts[1].cable("down")
        job.go()
        begin = time.monotonic()
        while not all("RankLost: another rank did not take part" in log.read_text() for log in job.logs):
            assert time.monotonic() < begin + 100, job.text()[-6000:]
            time.sleep(0.2)
        told = time.monotonic() - begin
        assert job.processes[0].wait(100) != 0
        print(
            f"{engine}: both ranks said so {told:.0f} s after the cut, the first launcher ended after "
            f"{time.monotonic() - begin:.0f} s"
        )
        cluster.hosts[1].cable("up")
        assert job.processes[1].wait(150) != 0
    resume(cluster, name, engine, more, nodes=2)


def test_two_host_power_cut(cluster: Cluster, tmp_path: Path) -> None:
    """A host is gone without a word; the other one ends in time, and goes on alone with both ranks."""
    with two_hosts(tmp_path) as hosts:
        fragile = Cluster(hosts, cluster.folder, cluster.env, cluster.runs)
        with Interrupted(fragile, "power", ["--ddp_timeout", "20"]) as job:
            hosts[1].cable("down")
            hosts[1].kill()
            job.go()
            begin = time.monotonic()
            assert job.processes[0].wait(150) != 0
            print(f"the host that was left ended after {time.monotonic() - begin:.0f} s")
            assert "another rank did not take part" in job.logs[0].read_text()
    resume(cluster, "power", "ddp", [], nodes=1)


def resume(cluster: Cluster, name: str, engine: str, more: list[str], nodes: int) -> None:
    """Go on from the newest checkpoint, on as many hosts; ends as the run without a fault."""
    told = [*script("torchrun_node.sh"), *more, *flags(cluster, name), "--save_steps", "2", "--resume", "auto"]
    env = {"NODES": str(nodes), "RANKS_PER_NODE": str(2 // nodes), "RENDEZVOUS": "node1:29400", "JOB": f"{name}-again"}
    text = cluster.run(f"{name}-again", *[(told, env)] * nodes)
    assert "resuming from" in text and "checkpoint-2" in text
    assert_same(one_host(cluster, engine), cluster.output(name), engine)
