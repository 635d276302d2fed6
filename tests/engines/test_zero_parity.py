"""Invariant 1: ZeRO 0 to 3 give the twin's parameters whatever DeepSpeed is told to do; test_methods.py has every
strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from reference import Run
from spawn import run_ranks
from tiny import Case
from torch_jobs import check_runs, once
from zero_jobs import Job, run_all, runs_of

STAGES = (0, 1, 2, 3)
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
    lists = {"variants": VARIANTS, "layout": LAYOUT}

    @once
    def of(key: tuple[str, int]) -> list[dict[str, Run | str]]:
        return run_ranks(run_all, key[1], lists[key[0]])

    return lambda name, world: of((name, world))


@pytest.mark.parametrize(
    ("which", "world", "job"),
    [("variants", 2, job) for job in VARIANTS] + [("layout", 3, job) for job in LAYOUT],
    ids=str,
)
def test_settings(which: str, world: int, job: Job, ranks: Any, parity_log: list[str]) -> None:
    """DeepSpeed's settings change how gradients travel and where they lie, never what is learned."""
    check_runs(runs_of(ranks(which, world), job), job.case, str(job), parity_log)
