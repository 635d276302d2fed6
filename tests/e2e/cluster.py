"""A cluster of a few hosts, runs on it, and what they are compared with."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from hosts import BIN, ROOT, Host
from launching import NURSERY
from safetensors.torch import load_file

FLAGS = ["--task", "snippets", "--max_steps", "4", "--save_steps", "4", "--logging_steps", "1"]
FLAGS += ["--max_train_samples", "64", "--max_eval_samples", "8", "--max_length", "32", "--learning_rate", "1e-4"]
FLAGS += ["--per_device_train_batch_size", "4", "--disable_tqdm", "true", "--report_to", "none"]
ZERO2 = ["--deepspeed", "ds_configs/zero2.json"]
TIMEOUT = 240

#: What a rank needs to know on a host; ssh carries nothing over.
VARIABLES = {
    "PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", ""), "/usr/sbin"]),
    "PYTHONPATH": os.pathsep.join([str(NURSERY), str(ROOT)]),
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "100",
}


@dataclass
class Cluster:
    """Hosts, and what was run on them."""

    hosts: tuple[Host, ...]
    folder: Path
    model: str
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


def script(name: str) -> list[str]:
    return ["bash", f"launch/cluster/{name}"]


def accelerate_config(folder: Path) -> Path:
    """The multi-host config, made to run on CPUs."""
    path = folder / "fsdp2_nodes.yaml"
    config = yaml.safe_load((ROOT / "ds_configs" / "fsdp2_nodes.yaml").read_text())
    path.write_text(yaml.safe_dump({**config, "use_cpu": True}))
    return path


def flags(cluster: Cluster, name: str) -> list[str]:
    return [*FLAGS, "--model", cluster.model, "--output_dir", str(cluster.output(name))]


def fsdp_variables(cluster: Cluster) -> dict[str, str]:
    config = str(accelerate_config(cluster.folder))
    return {"CONFIG": config, "PROGRAM": "tests/e2e/scripts/cpu_fsdp.py rose_ds"}


def one_host(cluster: Cluster, engine: str, ranks: int = 2, more: Sequence[str] = ()) -> Path:
    """output_dir of the run with all ranks on node1."""
    name = f"one-{engine}"
    if name not in cluster.runs:
        told = [*flags(cluster, name), *more]
        command, env = {
            "ddp": (
                [*script("torchrun_node.sh"), *told],
                {"NODES": "1", "RANKS_PER_NODE": str(ranks), "RENDEZVOUS": "node1:29400", "JOB": name},
            ),
            "zero2": ([str(BIN / "deepspeed"), "--num_gpus", str(ranks), "launch/train.py", *ZERO2, *told], {}),
            "fsdp2": (
                [*script("accelerate_node.sh"), *told],
                {
                    "NODES": "1",
                    "RANKS": str(ranks),
                    "NODE_RANK": "0",
                    "MASTER_ADDR": "node1",
                    **fsdp_variables(cluster),
                },
            ),
        }[engine]
        cluster.run(name, (command, env))
        cluster.runs[name] = cluster.output(name)
    return cluster.runs[name]


def history(output_dir: Path) -> list[dict[str, Any]]:
    state = json.loads((output_dir / "checkpoint-4" / "trainer_state.json").read_text())
    entries: list[dict[str, Any]] = state["log_history"]
    return entries


def assert_same(one: Path, two: Path, engine: str, ranks: int = 2) -> None:
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
    assert (metrics["engine"], metrics["world_size"], metrics["steps"]) == (engine, ranks, 4)


def assert_goes_on(one: Path, two: Path) -> None:
    """Of a run resumed with fewer ranks after its second step: the same rows with other dropout masks."""
    expected, found = history(one), history(two)
    assert found[:2] == expected[:2]
    for want, got in zip(expected[2:], found[2:], strict=True):
        assert got["step"] == want["step"] and abs(got["loss"] - want["loss"]) < 0.1 * want["loss"]
        assert 0.5 < got["rose/tau_second"] / want["rose/tau_second"] < 2


# --- faults ---

FAULTY = {"RANKS_PER_NODE": "1", "RENDEZVOUS": "node1:29400", "PROGRAM": "tests/e2e/scripts/faulty.py"}


@dataclass
class Interrupted:
    """A job of one rank a host; all wait in their fourth step, with a checkpoint after the second."""

    cluster: Cluster
    name: str
    flags: list[str]
    env: dict[str, str] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    logs: list[Path] = field(default_factory=list)

    def __enter__(self) -> Interrupted:
        out = self.cluster.folder / f"out-{self.name}"
        out.mkdir()
        env = {
            **FAULTY,
            "NODES": str(len(self.cluster.hosts)),
            "JOB": self.name,
            "FAULTS": json.dumps({"pause": 3, "out": str(out)}),
            **self.env,
        }
        told = [*script("torchrun_node.sh"), *flags(self.cluster, self.name), "--save_steps", "2", *self.flags]
        for at in range(len(self.cluster.hosts)):
            process, log = self.cluster.start(self.name, told, at, **env)
            self.processes.append(process)
            self.logs.append(log)
        deadline = time.monotonic() + TIMEOUT
        while len(list(out.glob("pausing-*"))) < len(self.cluster.hosts):
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


def resume(cluster: Cluster, name: str, more: Sequence[str], nodes: int, ranks: int = 2) -> str:
    """Go on from the newest checkpoint, on as many hosts and ranks; what they printed."""
    told = [*script("torchrun_node.sh"), *flags(cluster, name), "--save_steps", "2", "--resume", "auto", *more]
    job = f"{name}-again"
    env = {"NODES": str(nodes), "RANKS_PER_NODE": str(ranks // nodes), "RENDEZVOUS": "node1:29400", "JOB": job}
    text = cluster.run(job, *[(told, env)] * nodes)
    assert "resuming from" in text and "checkpoint-2" in text
    return text
