"""Optimizer state, and parameters, in host memory: strategies and settings that the engines' own tests leave out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_jobs
import zero_jobs
from reference import check_parity, reference
from spawn import run_ranks
from tiny import Case

OPTIMIZER = {"offload_optimizer": {"device": "cpu"}}
PARAMETERS = {**OPTIMIZER, "offload_param": {"device": "cpu"}}
CASES = [
    Case("first", accumulation=2, steps=4),
    Case("second", "tensor", steps=4),
    Case("none", accumulation=2, steps=4),
    Case(two_groups=True, mask_warmup_steps=2, steps=4),
]
ZERO = [
    *(zero_jobs.Job(case, stage, OPTIMIZER, {}, "offload") for stage in (1, 2, 3) for case in CASES),
    *(zero_jobs.Job(case, 3, PARAMETERS, {}, "offload_param") for case in CASES),
    zero_jobs.Job(CASES[0], 3, {**PARAMETERS, "sub_group_size": 150}, {}, "offload_param-sub_groups"),
]
FSDP2 = [torch_jobs.Job(case, "fsdp2-offload") for case in CASES]


def run_all(rank: int, world: int) -> dict[str, Any]:
    """FSDP2's jobs, then ZeRO's."""
    return {**torch_jobs.run_all(rank, world, FSDP2), **zero_jobs.run_all(rank, world, ZERO)}


@pytest.fixture(scope="module")
def ranks(extensions: object) -> Callable[[], list[dict[str, Any]]]:
    """Everything on two ranks, in one spawn; remembered, a failure too."""
    of = torch_jobs.once(lambda world: run_ranks(run_all, world))
    return lambda: of(2)


@pytest.mark.parametrize("job", ZERO + FSDP2, ids=str)
def test_parity(job: Any, ranks: Any, parity_log: list[str]) -> None:
    """RoseAdamW on state in host memory takes the twin's steps."""
    runs, twin = zero_jobs.runs_of(ranks(), job), reference(job.case)
    zero_jobs.check_ranks_agree(runs)
    for report, want in zip(runs[0].reports, twin.steps, strict=True):
        assert math.isclose(report.grad_norm, want.grad_norm, rel_tol=1e-4) and not report.skipped
    parity_log.append(f"{job} x2: {check_parity(runs[0].parameters, twin)}")
    assert torch.equal(runs[0].stream, twin.stream)
