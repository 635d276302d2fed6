"""Two mesh dimensions on four ranks: hybrid sharding, whose replicas count once, and tensor parallelism with FSDP2."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import Run
from spawn import run_ranks
from tiny import Case
from torch_jobs import Job, check, check_taus, mesh_2d, once, risks_of_all, run_all, start

from rose_ds.engines.torch.sharded import Composed
from rose_ds.exchange import GroupExchange, group_exchange

STRATEGIES = ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")
HYBRID1 = [f"fsdp1-{strategy}-{kind}" for strategy in STRATEGIES for kind in ("orig", "flat")]
#: four ranks divide a batch of 12 by 1 and 3 micro-batches
CASES = [Case(s, g, a) for s in ("first", "second", "ensemble") for g in ("element", "tensor") for a in (1, 3)]
CASES += [Case("none", accumulation=3), Case(two_groups=True), Case(checkpointing=True)]
#: two data parallel ranks
TP_CASES = [replace(case, accumulation=min(case.accumulation, 2)) for case in CASES]
#: hidden 19 over two tensor parallel and two data parallel ranks is uneven twice, 20 is even
EVEN = [replace(case, hidden=20) for case in TP_CASES if case.strategy == "ensemble"]
JOBS = [
    *(Job(case, "hsdp") for case in CASES),
    *(Job(case, "tp") for case in TP_CASES + EVEN),
    *(Job(case, how) for how in HYBRID1 for case in (Case(), Case("first", "tensor", 3))),
    *(Job(case, "fsdp2") for case in (Case(accumulation=3), Case("ensemble", "tensor"))),
]
RISKS = ["hsdp", "tp", HYBRID1[0], "fsdp2"]


def exchanges(how: str) -> list[type]:
    """Types of the exchanges that a model's thresholds need."""
    return [type(exchange) for exchange in start(Job(Case(), how))[1].engine.layout.exchanges]


def composed(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of an exchange over both dimensions: gathered counts, summed counts, and sums of floats."""
    mesh = mesh_2d("dp", "tp")
    groups = [mesh.get_group(dim) for dim in (0, 1)]
    gathered = Composed([group_exchange(group, "all_gather") for group in groups])
    summed = Composed([group_exchange(group, "all_reduce") for group in groups])
    counts = torch.tensor([rank, 10 + rank])
    return gathered(counts), summed(counts), gathered(0.1 * counts.double())


def everything(rank: int, world: int) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    results: dict[str, Any] = {"jobs": run_all(rank, world, JOBS)}
    if not any(isinstance(run, str) for run in results["jobs"].values()):
        results["risks"] = risks_of_all(rank, world, RISKS)
        results["exchanges"] = {how: exchanges(how) for how in ("hsdp", "tp")}
        results["composed"] = composed(rank, world)
    return results


@pytest.fixture(scope="module")
def ranks() -> Callable[[int], list[dict[str, Any]]]:
    """Everything on 4 ranks, in one spawn; remembered."""
    return once(lambda world: run_ranks(everything, world, timeout=400))


def jobs_of(results: list[dict[str, Any]]) -> list[dict[str, Run | str]]:
    return [result["jobs"] for result in results]


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_parity(job: Job, ranks: Any, parity_log: list[str]) -> None:
    """Invariant 1; the clipped norm is over every element once, whatever mesh it lies on."""
    check(jobs_of(ranks(4)), job, parity_log)


@pytest.mark.parametrize("how", RISKS)
def test_taus(how: str, ranks: Any) -> None:
    """Invariant 2: the same on all four ranks, each element counted once."""
    check_taus([result["risks"] for result in ranks(4)], how)


def test_exchanges(ranks: Any) -> None:
    """Replicas are in no exchange; tensor parallel matrices are added over both dimensions, the rest over one."""
    for result in ranks(4):
        assert result["exchanges"] == {"hsdp": [GroupExchange], "tp": [Composed, GroupExchange]}


def test_composed(ranks: Any) -> None:
    """One row a rank, or one row of sums; the same on all ranks."""
    for gathered, summed, floats in (result["composed"] for result in ranks(4)):
        assert sorted(gathered.tolist()) == [[0, 10], [1, 11], [2, 12], [3, 13]]
        assert summed.tolist() == [[6, 46]]
        assert torch.equal(floats, ranks(4)[0]["composed"][2]) and floats.shape == (4, 2)
