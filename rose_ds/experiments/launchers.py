"""How a sweep starts a run, from the words of a ``rose-ds`` command; where it runs; and how it is told to stop."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_POLL_SECONDS = 0.2
#: A Slurm task: srun makes SIGKILL of its own SIGTERM, and hands SIGUSR1 on, of which this makes the SIGTERM. One of
#: Slurm's own reaches the run too, and must not end this shell, with which Slurm would end the run.
_TASK = (
    "trap : TERM; (trap '' USR1; exec \"$@\") & run=$!; trap 'kill -TERM $run' USR1; code=0; wait $run || code=$?; "
    "while kill -0 $run 2>/dev/null; do code=0; wait $run || code=$?; done; exit $code"
)


@dataclass(frozen=True)
class Launcher:
    """One way to start a run."""

    command: Callable[[Sequence[str], Sequence[str]], list[str]]
    """From the words of a command and those that the user has for the launcher."""
    stop: signal.Signals = signal.SIGTERM
    """What its process hands on to the run as SIGTERM."""
    tells_ranks: bool = True
    """Or else its process ends at SIGTERM and tells its ranks nothing: they are signalled with it."""

    def tell_to_stop(self, process: subprocess.Popen[bytes]) -> None:
        """The run of a process, started as the first of a group, saves a checkpoint and ends."""
        if process.poll() is None:
            if self.tells_ranks:
                process.send_signal(self.stop)
            else:
                os.killpg(process.pid, self.stop)

    def has_ended(self, process: subprocess.Popen[bytes]) -> bool:
        """It, and its ranks too, which may still be saving when it has gone."""
        return process.poll() is not None and (self.tells_ranks or not _any_left(process.pid))

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        """Until it has ended."""
        process.wait()
        while not self.has_ended(process):
            time.sleep(_POLL_SECONDS)


@dataclass(frozen=True)
class Place:
    """Where one of the runs at a time runs."""

    words: tuple[str, ...]
    """For the launcher."""
    defaults: dict[str, str]
    """Variables, where the user has not set them."""
    chosen: dict[str, str]
    """Variables, whatever is set."""


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def local(words: Sequence[str], extra: Sequence[str]) -> list[str]:
    """One process on this machine. ``extra`` goes to Python."""
    return [sys.executable, *extra, "-m", "rose_ds", *words]


def deepspeed(words: Sequence[str], extra: Sequence[str]) -> list[str]:
    """The deepspeed launcher, with a port of its own. ``extra``: e.g. --num_gpus 2; the sweep's settings need a
    ``deepspeed`` config.
    """
    program = str(Path(sys.executable).with_name("deepspeed"))
    ranks = [program, "--master_port", str(free_port()), *extra, "--no_local_rank", "--module"]
    return [*ranks, "rose_ds", *words]


def slurm(words: Sequence[str], extra: Sequence[str]) -> list[str]:
    """One task through srun: inside an allocation a step of it, outside one an allocation of its own. ``extra``: e.g.
    --partition=a100 --gres=gpu:1 --cpus-per-task=8 --mem=32G.
    """
    step = ["srun", "--nodes=1", "--ntasks=1", "--exact", "--kill-on-bad-exit=1", *extra]
    return [*step, "bash", "-c", _TASK, "run", sys.executable, "-m", "rose_ds", *words]


def _any_left(group: int) -> bool:
    """Of a group of processes that this one started; where nobody reaps them, the dead stay in it."""
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
        except ProcessLookupError:
            continue
    return False


LAUNCHERS = {
    "local": Launcher(local),
    "deepspeed": Launcher(deepspeed, tells_ranks=False),
    "slurm": Launcher(slurm, stop=signal.SIGUSR1),
}


_CHOICES = {"--include", "--exclude", "--hostfile", "-H", "-i", "-e"}


def places(name: str, jobs: int, extra: Sequence[str], *, fixed_batch: bool = True) -> list[Place]:
    """For ``jobs`` runs at a time: this machine's GPUs and cores are shared out among them.

    Args:
        fixed_batch: the runs' global batch is given, and is not that of however many ranks there are.

    Raises:
        ValueError: there are not so many GPUs, or the words name some themselves; or nothing says how many ranks a run
            has, and so how large its batch is.
    """
    common = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if name == "slurm":  # whose step has cores of its own
        return [Place(tuple(extra), common, {})] * jobs
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_gpus", "--num_accelerators", type=int)
    given, rest = parser.parse_known_args(list(extra))
    devices = _devices()
    if name == "deepspeed" and os.environ.get("DS_ACCELERATOR") == "cpu":
        devices = []
    chosen_ranks = _CHOICES & {word.split("=")[0] for word in rest}
    if name == "deepspeed" and len(devices) > 1 and not (fixed_batch or given.num_gpus or chosen_ranks):
        raise ValueError(
            "a run would take all GPUs that --jobs leaves it, and its batch with them, here another than on another "
            'machine: give --launcher_args="--num_gpus N", or the setting global_batch_size'
        )
    ranks = given.num_gpus or max(1, len(devices) // jobs) if name == "deepspeed" else 1
    named = os.environ.get("CUDA_VISIBLE_DEVICES")  # which deepspeed drops where it is told --num_gpus
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = []
    for job in range(jobs):
        words, chosen = tuple(extra), {}
        if name == "local" and len(devices) > 1:
            chosen["CUDA_VISIBLE_DEVICES"] = devices[job % len(devices)]
        elif name == "deepspeed" and devices and (jobs > 1 or (given.num_gpus and named and not chosen_ranks)):
            if not all(device.isdigit() for device in devices):
                raise ValueError(
                    "CUDA_VISIBLE_DEVICES names devices by their ids, which deepspeed's launcher does not know: give "
                    "their numbers"
                )
            if chosen_ranks:
                raise ValueError("--jobs above 1 shares this machine's GPUs out: leave --include and the like out")
            if ranks * jobs > len(devices):
                raise ValueError(f"--jobs {jobs} with {ranks} GPUs each is more than the {len(devices)} here")
            words = ("--include", f"localhost:{','.join(devices[job * ranks : (job + 1) * ranks])}", *rest)
        # more threads than cores slow every run down
        threads = str(max(1, cores // (jobs * ranks)))
        found.append(Place(words, {**common, "OMP_NUM_THREADS": threads}, chosen))
    return found


def _devices() -> list[str]:
    """CUDA devices that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    count, chosen = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if count == 0 or chosen is None:
        return [str(i) for i in range(count)]
    return [device for device in chosen.split(",") if device]
