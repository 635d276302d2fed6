"""Ranks that are threads of this process, whose exchanges are what all_gather (or all_reduce) of a group gives."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from rose_ds.core.threshold import Exchange


class Group:
    """Ranks that exchange with each other; ``summed``: the sum of the rows alone, as all_reduce."""

    def __init__(self, ranks: list[int], *, summed: bool = False) -> None:
        self.place = {rank: i for i, rank in enumerate(ranks)}
        self.rows: list[Tensor] = [torch.empty(0)] * len(ranks)
        self.stacked, self.summed = torch.empty(0), summed
        self.barrier = threading.Barrier(len(ranks), action=self._stack, timeout=60)

    def _stack(self) -> None:
        stacked = torch.stack(self.rows)
        self.stacked = stacked.sum(0, keepdim=True) if self.summed else stacked

    def exchange_of(self, rank: int) -> Exchange:
        def exchange(mine: Tensor) -> Tensor:
            self.rows[self.place[rank]] = mine
            self.barrier.wait()
            found = self.stacked
            self.barrier.wait()  # before the next exchange writes its rows
            return found

        return exchange


def at_once(world: int, job: Callable[[int], Any]) -> list[Any]:
    """``job(rank)`` on every rank."""
    with ThreadPoolExecutor(world) as pool:
        return [future.result() for future in [pool.submit(job, rank) for rank in range(world)]]
