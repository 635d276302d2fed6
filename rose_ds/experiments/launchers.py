"""How a sweep starts a run: from the words of a ``rose-ds`` command to one that lasts as long and passes SIGTERM on."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

Launcher = Callable[[Sequence[str], Sequence[str]], list[str]]


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
    --partition=a100 --gres=gpu:1.
    """
    step = ["srun", "--nodes=1", "--ntasks=1", "--exact", "--kill-on-bad-exit=1", *extra]
    return [*step, sys.executable, "-m", "rose_ds", *words]


LAUNCHERS: dict[str, Launcher] = {"local": local, "deepspeed": deepspeed, "slurm": slurm}
