"""FullyShardedDataParallel: the twin's parameters for every sharding strategy, with and without original parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import Run, train
from spawn import run_ranks
from tiny import Case, Gate, Tiny, make_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel, MixedPrecision, ShardingStrategy, fully_shard
from torch_jobs import (
    BEFORE,
    EXTRAS,
    FEW,
    MATRIX,
    Job,
    check,
    check_taus,
    fsdp1,
    leak,
    load,
    message_of,
    once,
    prepare,
    risks_of_all,
    run_all,
    save,
)

import rose_ds

FULL, FLAT = "fsdp1-FULL_SHARD-orig", "fsdp1-FULL_SHARD-flat"
OTHERS = [f"fsdp1-{strategy}-{kind}" for strategy in ("SHARD_GRAD_OP", "NO_SHARD") for kind in ("orig", "flat")]
#: flat parameters cannot be cut into the two groups by name, nor frozen in part
FLAT_EXTRAS = [case for case in EXTRAS if not (case.two_groups or case.frozen)]
ENSEMBLE = [case for case in MATRIX if case.strategy == "ensemble"]
TWO = [
    *(Job(case, FULL) for case in FEW + [case for case in EXTRAS if not case.frozen]),  # test_methods.py: strategies
    *(Job(case, FLAT) for case in ENSEMBLE + FLAT_EXTRAS),
    *(Job(case, how) for how in OTHERS for case in FEW + ENSEMBLE[1:2]),
]
THREE = [Job(case, how) for how in (FULL, FLAT) for case in ENSEMBLE] + [Job(FEW[0], how) for how in OTHERS]
RISKS = [FULL, FLAT, "fsdp1-NO_SHARD-orig"]


class One(nn.Module):
    """A model of one element, under a name that may be masked: a rank holds nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Gate()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), 0.3)


def one_element(rank: int, world: int) -> list[Any]:
    """Reports of a run whose first step takes no KL gradient: every rank must know how many steps were taken."""
    model = FullyShardedDataParallel(One(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = rose_ds.RoseAdamW(model.named_parameters(), lr=0.1, strategy="ensemble", mask_warmup_steps=1)
    stepper = rose_ds.prepare(model, optimizer)
    torch.manual_seed(rank)
    x, y = torch.randn(8, 3), torch.randint(0, 3, (8,))
    reports = []
    for _ in range(3):
        stepper.backward(lambda: model(x), lambda logits: F.cross_entropy(logits, y))
        reports.append(stepper.step())
    return [*reports, stepper.gather_parameters()["layer.weight"].item()]


def one_element_left_to_its_optimizer(rank: int, world: int) -> list[Any]:
    """Whether each step was skipped in a loop that tells no norm, under FSDP1 and then FSDP2: in the second step of
    each one rank's loss is NaN, and one rank holds no gradient at all."""
    torch.manual_seed(rank)
    x, y = torch.randn(8, 3), torch.randint(0, 3, (8,))
    whole = FullyShardedDataParallel(One(), use_orig_params=True, device_id=torch.device("cpu"))
    models: list[nn.Module] = [whole, fully_shard(One())]
    found = []
    for model in models:
        optimizer = rose_ds.RoseAdamW(model.named_parameters(), lr=0.1, strategy="second")
        stepper = rose_ds.prepare(model, optimizer)
        for factor in (1.0, math.nan if rank == 1 else 1.0, 1.0):
            stepper.backward(lambda m=model: m(x), lambda z, f=factor: f * F.cross_entropy(z, y))
            stepper.leave_step_to_optimizer(last=True)
            optimizer.step()
            optimizer.zero_grad()
            found.append(stepper.last_report.skipped)
    return found


def refused(rank: int, world: int) -> dict[str, str]:
    """What prepare() or a step says to each configuration that it refuses."""

    def model() -> Tiny:
        return make_model(Case())

    def wrap(inner: nn.Module, **options: Any) -> nn.Module:
        return fsdp1(inner, ShardingStrategy.FULL_SHARD, True, **options)

    def no_sync() -> Any:
        wrapped = wrap(model())
        stepper = prepare(wrapped)
        with wrapped.no_sync():
            train(stepper, wrapped, Case(steps=1), rank, world)

    def ignored() -> Any:
        inner = model()
        return prepare(wrap(inner, ignored_states=[inner.head.weight]))

    def stranger() -> Any:
        wrapped = wrap(model())
        named = [*wrapped.named_parameters(), ("layer.extra.weight", nn.Parameter(torch.ones(2)))]
        return prepare(wrapped, named)

    def without_rng() -> Any:
        inner = model()
        inner.layer[0] = checkpoint_wrapper(inner.layer[0], preserve_rng_state=False)
        return prepare(wrap(inner))

    def inner_only() -> Any:
        inner = model()
        inner.layer[0] = wrap(inner.layer[0])
        return prepare(inner)

    def counter() -> Any:
        wrapped = wrap(model())
        stepper = prepare(wrapped)
        calls = iter([0.0, 0.0, 1.0])
        train(stepper, lambda ids: wrapped(ids) + next(calls), Case(steps=1), rank, world)

    return {
        "no_sync": message_of(no_sync),
        "ignored": message_of(ignored),
        "offload": message_of(lambda: prepare(wrap(model(), cpu_offload=CPUOffload(offload_params=True)))),
        "reduction": message_of(lambda: prepare(wrap(model(), mixed_precision=REDUCED_IN_FP16))),
        "stranger": message_of(stranger),
        "rng": message_of(without_rng),
        "inner": message_of(inner_only),
        "counter": message_of(counter),
    }


REDUCED_IN_FP16 = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float16)
REFUSALS = {
    "no_sync": ("RefusedConfiguration", "no_sync()", "sync_each_batch"),
    "ignored": ("RefusedConfiguration", "head.weight", "freeze"),
    "offload": ("RefusedConfiguration", "CPUOffload(offload_params=True)", "CPUOffloadPolicy"),
    "reduction": ("RefusedConfiguration", "reduce_dtype=torch.float16", "torch.bfloat16 or torch.float32"),
    "stranger": ("RefusedConfiguration", "1 tensors", "named_parameters()"),
    "rng": ("RefusedConfiguration", "'layer.0'", "preserve_rng_state=True"),
    "inner": ("TypeError", "layer.0", "FullyShardedDataParallel", "plain Tiny"),
    "counter": ("RuntimeError", "other logits"),
}


def everything(rank: int, world: int, jobs: list[Job], extras: bool) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    results: dict[str, Any] = {"jobs": run_all(rank, world, jobs)}
    if extras and not any(isinstance(run, str) for run in results["jobs"].values()):
        results["risks"] = risks_of_all(rank, world, RISKS)
        results["leak"] = [leak(rank, world, how) for how in (FULL, FLAT, "fsdp1-NO_SHARD-orig")]
        results["one"] = one_element(rank, world)
        results["left"] = one_element_left_to_its_optimizer(rank, world)
        results["refused"] = refused(rank, world)
    return results


@pytest.fixture(scope="module")
def ranks() -> Callable[[int], list[dict[str, Any]]]:
    """Everything on 2 or 3 ranks, in one spawn; remembered."""
    return once(lambda world: run_ranks(everything, world, TWO if world == 2 else THREE, world == 2))


def jobs_of(results: list[dict[str, Any]]) -> list[dict[str, Run | str]]:
    return [result["jobs"] for result in results]


@pytest.mark.parametrize(("world", "job"), [(2, job) for job in TWO] + [(3, job) for job in THREE], ids=str)
def test_parity(world: int, job: Job, ranks: Any, parity_log: list[str]) -> None:
    """Invariant 1, for every strategy; the replayed pass leaves the random numbers as they were."""
    check(jobs_of(ranks(world)), job, parity_log)


@pytest.mark.parametrize("how", RISKS)
def test_taus(how: str, ranks: Any) -> None:
    """Invariant 2: over all shards, without the flat parameters' padding."""
    check_taus([result["risks"] for result in ranks(2)], how)


def test_kl_gradient_leaks_nowhere(ranks: Any) -> None:
    """Invariant 4: keeping everything is AdamW, bit for bit, also with evaluations in between."""
    assert all(result["leak"] == [True, True, True] for result in ranks(2))


def test_a_rank_that_holds_nothing(ranks: Any) -> None:
    """It counts steps like the others, joins every exchange, and sees the same thresholds."""
    first, second = (result["one"] for result in ranks(2))
    assert first == second
    assert [report.step for report in first[:3]] == [1, 2, 3]
    assert [report.tau_first is None for report in first[:3]] == [True, False, False]
    assert all(report.eligible == 1 for report in first[:3])


def test_a_rank_that_holds_nothing_hears_of_a_gradient_that_is_not_finite(ranks: Any) -> None:
    assert [result["left"] for result in ranks(2)] == [[False, True, False] * 2] * 2


@pytest.mark.parametrize("what", REFUSALS)
def test_refused(what: str, ranks: Any) -> None:
    """Invariant 6: the message names the setting and the way out, on every rank."""
    for result in ranks(2):
        for part in REFUSALS[what]:
            assert part in result["refused"][what], result["refused"][what]


def test_checkpoint_on_other_world_sizes(tmp_path: Path) -> None:
    """A full state dict of 2 ranks, read on 1, 2 and 4: the same losses and thresholds, bit for bit."""
    case = replace(BEFORE, two_groups=True)
    want, *others = run_ranks(save, 2, FULL, case, str(tmp_path))
    assert others == [want] and want[1][-1][0] == 2 * case.steps
    for world in (1, 2, 4):
        assert run_ranks(load, world, FULL, case, str(tmp_path)) == [want] * world
