"""The launcher of the other tests: results by rank, and failures that say where and what."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from spawn import RanksFailed, run_ranks


def add_up(rank: int, world: int, start: int) -> tuple[int, str, int]:
    total = torch.tensor(start + rank)
    dist.all_reduce(total)
    return int(total), os.environ["OMP_NUM_THREADS"], torch.get_num_threads()


def fail(rank: int, world: int) -> None:
    if rank == 1:
        raise KeyError("no such thing")
    dist.barrier()


def hang(rank: int, world: int) -> None:
    time.sleep(60 if rank == 0 else 0)


def die(rank: int, world: int) -> None:
    os._exit(3)


def test_results_come_by_rank() -> None:
    assert run_ranks(add_up, 3, 10) == [(33, "1", 1)] * 3


def test_an_exception_comes_back_with_rank_and_traceback() -> None:
    """And the rank that waits for the failed one does not keep anybody waiting."""
    before = time.monotonic()
    with pytest.raises(RanksFailed, match=r"(?s)rank 1:.*in fail.*KeyError: 'no such thing'"):
        run_ranks(fail, 2)
    assert time.monotonic() - before < 60


def test_a_rank_that_hangs_is_killed() -> None:
    with pytest.raises(RanksFailed, match="rank 0 did not finish and was killed"):
        run_ranks(hang, 2, timeout=8, process_group=False)


def test_a_rank_that_dies() -> None:
    with pytest.raises(RanksFailed, match="rank 0 died without a word, exit code 3"):
        run_ranks(die, 1, process_group=False)
