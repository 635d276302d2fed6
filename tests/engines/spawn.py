"""Run a function on several gloo ranks of this machine and bring back what each returned or raised."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: Imported once, in a process without threads from which the ranks are forked: for most of them half of their life.
PRELOADED = [
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.checkpoint",
    "torch._dynamo",
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",  # what initialize() imports
    "deepspeed.runtime.zero.muon.muon_optimizer",
]
_GRACE = 10.0  # seconds that the other ranks get to end after one has failed


class RanksFailed(AssertionError):
    """Some ranks raised, died or did not finish; the message has every traceback, with its rank."""


def free_port() -> int:
    """A TCP port that nobody listens on now, below those that the system hands out to others in the meantime."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def run_ranks(
    worker: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 400,
    env: dict[str, str] | None = None,
    process_group: bool = True,
    fresh: bool = False,
) -> list[Any]:
    """``[worker(rank, world, *args) for rank in range(world)]``, each in a fresh process.

    Args:
        worker: an importable top-level function; its arguments and result are pickled.
        timeout: seconds for all; a rank that is not done by then is killed.
        env: more environment variables for the ranks.
        process_group: start a gloo process group before ``worker`` and destroy it afterwards.
        fresh: start each rank from nothing, with this process's environment, instead of forking one that has imported
            DeepSpeed: that has looked for a GPU, and its children could not use one.

    Raises:
        RanksFailed: with rank and traceback of everything that went wrong.
    """
    context: Any = multiprocessing.get_context("spawn" if fresh else "forkserver")
    if not fresh:
        context.set_forkserver_preload(PRELOADED)
    variables = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        # without it ZeRO-3 starts numactl for every bucket; with the ranks' number DeepSpeed makes 69 MB of shared
        # memory a rank, which one that is killed leaves behind
        "LOCAL_SIZE": "1",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        **(env or {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        job = (worker, world, args, variables, process_group, folder)
        children = [context.Process(target=_rank, args=(rank, *job), daemon=True) for rank in range(world)]
        try:
            for child in children:
                child.start()
            late = _wait(children, time.monotonic() + timeout)
        finally:  # also where this test has run out of its own time
            for child in children:
                if child.is_alive():
                    child.kill()
                    child.join()
        return _collect(Path(folder), children, late)


def run_each(rank: int, jobs: Iterable[Any], run: Callable[[Any], Any]) -> dict[str, Any]:
    """On a rank, every job's result by its name, up to the first that fails, whose result is a traceback: the ranks
    cannot go on together.
    """
    results: dict[str, Any] = {}
    for job in jobs:
        try:
            results[str(job)] = run(job)
        except Exception:
            results[str(job)] = f"rank {rank}, {job}:\n{traceback.format_exc()}"
            break
    return results


def _wait(children: list[Any], deadline: float) -> list[int]:
    """Wait for all; kill those that are still running at the deadline, or soon after another one failed."""
    while any(child.is_alive() for child in children):
        if any(child.exitcode not in (None, 0) for child in children):
            deadline = min(deadline, time.monotonic() + _GRACE)
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    late = [rank for rank, child in enumerate(children) if child.is_alive()]
    for rank in late:
        children[rank].kill()
    for child in children:
        child.join()
    return late


def _collect(folder: Path, children: list[Any], late: list[int]) -> list[Any]:
    results, problems = [], []
    for rank, child in enumerate(children):
        path = folder / f"{rank}.pt"
        if rank in late:
            problems.append(f"rank {rank} did not finish and was killed")
        elif not path.exists():
            stacks = (folder / f"{rank}.stacks").read_text()
            problems.append(f"rank {rank} died without a word, exit code {child.exitcode}\n{stacks}")
        else:
            result, error = torch.load(path, weights_only=False)
            results.append(result)
            if error is not None:
                problems.append(f"rank {rank}:\n{error}")
    if problems:
        raise RanksFailed("\n".join(problems))
    return results


def _rank(
    rank: int,
    worker: Callable[..., Any],
    world: int,
    args: tuple[Any, ...],
    variables: dict[str, str],
    process_group: bool,
    folder: str,
) -> None:
    os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
    stacks = (Path(folder) / f"{rank}.stacks").open("w")
    faulthandler.enable(stacks)  # the only words of a rank that a signal ends
    torch.set_num_threads(1)
    gc.freeze()  # what was imported: DeepSpeed collects garbage when an engine ends
    result, error = None, None
    try:
        if process_group:
            dist.init_process_group("gloo", timeout=timedelta(seconds=90))
        result = worker(rank, world, *args)
    except BaseException:  # whatever it was goes back to the parent, which raises
        error = traceback.format_exc()
    partial = Path(folder) / f"{rank}.partial"
    torch.save((result, error), partial)
    partial.rename(Path(folder) / f"{rank}.pt")
    if error is not None:
        os._exit(1)  # a clean exit would wait for the other ranks
    if dist.is_initialized():
        dist.destroy_process_group()
