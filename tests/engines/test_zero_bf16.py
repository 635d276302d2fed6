"""Mixed precision: fp32 masters that follow the fp32 twin as closely as bf16 gradients allow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import Run, reference
from spawn import run_ranks
from tiny import Case
from torch_jobs import once
from zero_jobs import Job, check_ranks_agree, run_all, runs_of

from rose_ds.core.mask import keep_count

BF16: dict[str, Any] = {"bf16": {"enabled": True}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
CASES = [
    Case("first", accumulation=2),
    Case("ensemble", "tensor"),
    Case("ensemble", accumulation=2, two_groups=True),
    Case("none", accumulation=2),
]
#: stage 1 with fp32 sums is DeepSpeed's BF16_Optimizer
SHARDED = [
    Job(case, stage, {}, BF16 | sums, f"bf16{'-fp32-sums' if sums else ''}")
    for stage, sums in ((1, {}), (1, FP32_SUMS), (2, {}), (2, FP32_SUMS), (3, {}), (3, FP32_SUMS))
    for case in CASES
]
REPLICATED = [Job(case, 0, {}, BF16, "bf16") for case in CASES[:3]]

#: bf16 keeps 8 bits: 5 steps of lr 0.03 end 0.004 to 0.009 (relative, whole vector) away from fp32
TOLERANCE = 0.02


@pytest.fixture(scope="session")
def ranks(extensions: object) -> Callable[[str], list[dict[str, Run | str]]]:
    """The jobs on two ranks, in one spawn; remembered."""

    @once
    def of(name: str) -> list[dict[str, Run | str]]:
        return run_ranks(run_all, 2, SHARDED if name == "sharded" else REPLICATED)

    return of


def check_bf16(runs: list[Run], job: Job) -> None:
    twin = reference(job.case)
    check_ranks_agree(runs)
    for step, (report, want) in enumerate(zip(runs[0].reports, twin.steps, strict=True), 1):
        assert report.step == step and not report.skipped
        assert math.isclose(report.grad_norm, want.grad_norm, rel_tol=0.05)
        for order, fraction in (("first", job.case.keep_first), ("second", job.case.keep_second)):
            tau, kept = getattr(report, f"tau_{order}"), getattr(report, f"kept_{order}")
            assert (tau is None) == (order not in want.tau)
            if tau is not None and tau > 0:  # every risk of the first step's Eq. 4 is 0
                k = keep_count(fraction, report.eligible)
                assert k <= kept <= k + 0.02 * report.eligible, "bf16 gradients tie, but not often"
    assert all(math.isfinite(loss) for run in runs for loss in run.losses)
    got = torch.cat([runs[0].parameters[name].flatten() for name in twin.parameters])
    want_all = torch.cat([p.flatten() for p in twin.parameters.values()])
    error = ((got - want_all).norm() / want_all.norm()).item()
    assert error < TOLERANCE
    assert not torch.equal(got, got.bfloat16().float()), "gather_parameters() gives the fp32 masters"


@pytest.mark.parametrize("job", SHARDED, ids=str)
def test_bf16(job: Job, ranks: Any) -> None:
    """Thresholds agree on all ranks, counts are Eq. 3's, and the masters stay close to an fp32 run."""
    check_bf16(runs_of(ranks("sharded"), job), job)


@pytest.mark.parametrize("job", REPLICATED, ids=str)
def test_bf16_replicated(job: Job, ranks: Any) -> None:
    """The same at stage 0, where DeepSpeed keeps fp32 copies of whole parameters."""
    check_bf16(runs_of(ranks("replicated"), job), job)
