"""Invariant 1: ZeRO 0 to 3 give the twin's parameters at 1, 2 and 3 ranks, whatever DeepSpeed is told to do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from reference import Run, Twin, check_parity, near_tau, reference
from spawn import run_ranks
from tiny import Case
from zero_jobs import Job, check_ranks_agree, run_all, runs_of

STAGES = (0, 1, 2, 3)
STRATEGIES = (
    *itertools.product(("first", "second", "ensemble"), ("element", "tensor"), (1, 2)),
    *itertools.product(("none",), ("element",), (1, 2)),
)
MATRIX = [Job(Case(*settings), stage) for stage in STAGES for settings in STRATEGIES]
#: three ranks: every strategy; a second micro-batch is nothing new there, nor is its absence
THREE = [job for job in MATRIX if job.case.accumulation == 2]
#: one rank, where nothing is split
ALONE = [job for job in MATRIX if job.case.strategy in ("ensemble", "none") and job.case.accumulation == 2]

ENSEMBLE = [Case(granularity=g, accumulation=ga) for g in ("element", "tensor") for ga in (1, 2)]
TWICE = [Case(accumulation=2)]
GROUPS = [Case(granularity=g, accumulation=2, two_groups=True) for g in ("element", "tensor")]
CHECKPOINTING = [Case(accumulation=ga, checkpointing=True) for ga in (1, 2)]
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}

#: (what differs, stages, zero_optimization, the rest of the config, cases)
SETTINGS: list[tuple[str, tuple[int, ...], dict[str, Any], dict[str, Any], list[Case]]] = [
    ("", STAGES, {}, {}, GROUPS),
    ("", (0, 2, 3), {}, {}, CHECKPOINTING),
    ("contiguous_gradients-off", (1, 2), {"contiguous_gradients": False}, {}, ENSEMBLE),
    ("overlap_comm-on", (1, 2), {"overlap_comm": True}, {}, ENSEMBLE),
    ("overlap_comm-off", (1, 2, 3), {"overlap_comm": False}, {}, TWICE),
    ("reduce_scatter-off", (1, 2, 3), {"reduce_scatter": False}, {}, TWICE),
    ("sub_groups", (3,), {"sub_group_size": 150}, {}, GROUPS + TWICE),
    ("whole-parameters", (3,), {"stage3_param_persistence_threshold": 10**6}, {}, TWICE),
    ("one-bucket", (1, 2, 3), {"reduce_bucket_size": 10**6}, {}, TWICE),
    ("offload", (1, 2, 3), OFFLOAD, {}, ENSEMBLE[1:3] + GROUPS[:1]),
    ("offload-sub_groups", (3,), {**OFFLOAD, "sub_group_size": 150}, {}, GROUPS[1:]),
    ("offload_param", (3,), {**OFFLOAD, "offload_param": {"device": "cpu"}}, {}, TWICE),
    ("", STAGES, {}, {}, [Case(accumulation=2, frozen=True)]),
    ("", STAGES, {}, {}, [Case(mask_warmup_steps=2)]),
    ("no-clipping", STAGES, {}, {}, [Case(clip=0.0)]),
    ("prescale", (0,), {}, {"prescale_gradients": True}, TWICE),
]
VARIANTS = [
    Job(case, stage, zero, config, name)
    for name, stages, zero, config, cases in SETTINGS
    for stage in stages
    for case in cases
]
#: three ranks for what changes where slices lie; how gradients travel does not depend on there being a third
LAYOUT = [job for job in VARIANTS if job.case.two_groups or job.case.frozen]


@pytest.fixture(scope="session")
def ranks(extensions: object) -> Callable[[str, int], list[dict[str, Run | str]]]:
    """Every job of a list on a number of ranks, in one spawn; remembered."""
    lists = {"matrix": MATRIX, "three": THREE, "alone": ALONE, "variants": VARIANTS, "layout": LAYOUT}

    @cache
    def of(name: str, world: int) -> list[dict[str, Run | str]]:
        return run_ranks(run_all, world, lists[name])

    return of


def check_reports(runs: list[Run], twin: Twin, case: Case) -> None:
    """Thresholds, counts, norms and losses are the twin's."""
    per_step = case.accumulation
    close = near_tau(twin)[0]
    for i, (report, want) in enumerate(zip(runs[0].reports, twin.steps, strict=True)):
        losses = [loss for run in runs for loss in run.losses[i * per_step : (i + 1) * per_step]]
        assert math.isclose(sum(losses) / len(losses), want.loss, rel_tol=1e-4)
        assert report.step == i + 1 and not report.skipped
        assert math.isclose(report.grad_norm, want.grad_norm, rel_tol=1e-4)
        for order in ("first", "second"):
            tau, kept = getattr(report, f"tau_{order}"), getattr(report, f"kept_{order}")
            if order not in want.tau:
                assert tau is None and kept is None
                continue
            assert math.isclose(tau, want.tau[order], rel_tol=1e-3, abs_tol=1e-6)
            assert abs(kept - want.kept[order]) <= close
            assert report.eligible == sum(risk.numel() for risk in want.risks[order].values())


@pytest.mark.parametrize(
    ("which", "world", "job"),
    [("alone", 1, job) for job in ALONE]
    + [("matrix", 2, job) for job in MATRIX]
    + [("three", 3, job) for job in THREE],
    ids=str,
)
def test_matrix(which: str, world: int, job: Job, ranks: Any, parity_log: list[str]) -> None:
    """Strategy x granularity x accumulation at every stage and world size, with clipping and real dropout; and torch's
    random numbers go on as if only the paper's passes had run."""
    runs, twin = runs_of(ranks(which, world), job), reference(job.case)
    check_ranks_agree(runs)
    check_reports(runs, twin, job.case)
    found = check_parity(runs[0].parameters, twin)
    parity_log.append(f"{job} x{world}: {found}")
    assert torch.equal(runs[0].stream, twin.stream), "the RNG stream after the last step"


@pytest.mark.parametrize(
    ("which", "world", "job"),
    [("variants", 2, job) for job in VARIANTS] + [("layout", 3, job) for job in LAYOUT],
    ids=str,
)
def test_settings(which: str, world: int, job: Job, ranks: Any, parity_log: list[str]) -> None:
    """DeepSpeed's settings change how gradients travel and where they lie, never what is learned."""
    runs, twin = runs_of(ranks(which, world), job), reference(job.case)
    check_ranks_agree(runs)
    check_reports(runs, twin, job.case)
    found = check_parity(runs[0].parameters, twin)
    parity_log.append(f"{job} x{world}: {found}")
    assert torch.equal(runs[0].stream, twin.stream), "the RNG stream after the last step"
