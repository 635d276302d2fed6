"""Training across two hosts: every launch script, the same thresholds, losses and weights as two ranks of one host."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import pytest
import yaml
from cluster import TIMEOUT, ZERO2, Cluster, assert_same, flags, fsdp_variables, one_host, script
from hosts import BIN, ROOT, Host

pytestmark = pytest.mark.timeout(1500)  # ten launches


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


def test_two_host_slurm_fsdp(cluster: Cluster) -> None:
    """Its one task of a node is launch/cluster/accelerate_node.sh."""
    command = ["sbatch", "--gpus-per-node=1", "launch/slurm/fsdp.sbatch", *flags(cluster, "slurm-fsdp2")]
    cluster.run("slurm-fsdp2", (command, {**slurm(cluster, "fsdp2"), **fsdp_variables(cluster)}))
    assert_same(one_host(cluster, "fsdp2"), cluster.output("slurm-fsdp2"), "fsdp2")


def test_two_host_slurm_preemption(cluster: Cluster) -> None:
    """The time limit is near: a checkpoint, back into the queue, and the run goes on as if nothing had been."""
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
        while not list(out.glob("told-*")):  # scancel reaches both hosts through ssh
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-6000:]
            time.sleep(0.05)
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
    (cluster.folder / name / "requeued").unlink()
    cluster.run(name, (command, restarted))
    assert not (cluster.folder / name / "requeued").exists()
    assert_same(one_host(cluster, "zero2"), cluster.output(name), "zero2")


def signal_batch_script(host: Host, script: str) -> None:
    """SIGUSR1 to the job's shell alone, as --signal=B: sends it."""
    shells = [
        process
        for process in host.processes()
        if process.name() == "bash" and any(argument.endswith(script) for argument in process.cmdline())
    ]
    assert len(shells) == 1, shells
    shells[0].send_signal(signal.SIGUSR1)


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
