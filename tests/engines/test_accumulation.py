"""Three to eight micro-batches to a step on every engine: KL and task gradients alternate and never meet.

One and two are in each engine's own tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_jobs
import zero_jobs
from plain_jobs import build
from reference import reference, train
from spawn import run_ranks
from tiny import Case

#: an even number of rows to a micro-batch, one or more for each of two ranks
BATCH = {3: 12, 4: 16, 5: 10, 6: 12, 7: 14, 8: 16}
CASES = [
    *(Case(accumulation=n, batch=batch, steps=3) for n, batch in BATCH.items()),
    Case("first", "tensor", accumulation=8, batch=16, steps=3),
    Case("second", accumulation=4, batch=16, steps=3, two_groups=True),
]
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}

TORCH = [torch_jobs.Job(case, how) for how in ("ddp", "fsdp1-FULL_SHARD-orig", "fsdp2") for case in CASES]
ZERO = [
    *(zero_jobs.Job(case, stage) for stage in (0, 1, 2, 3) for case in CASES),
    *(zero_jobs.Job(case, stage, OFFLOAD, {}, "offload") for stage in (2, 3) for case in CASES[1:6:2]),
]
#: fp32 sums of bf16 gradients: BF16_Optimizer and stage 3
HALF = [zero_jobs.Job(case, stage, {}, BF16, "bf16") for stage in (1, 3) for case in (CASES[0], CASES[5])]


@pytest.fixture(scope="module")
def torch_runs() -> Callable[[], Any]:
    """torch's wrappers on two ranks, in one spawn; remembered, a failure too."""
    of = torch_jobs.once(lambda world: run_ranks(torch_jobs.run_all, world, TORCH))
    return lambda: of(2)


@pytest.fixture(scope="module")
def zero_runs(extensions: object) -> Callable[[], Any]:
    """ZeRO on two ranks, in one spawn."""
    of = torch_jobs.once(lambda world: run_ranks(zero_jobs.run_all, world, ZERO + HALF))
    return lambda: of(2)


@pytest.mark.fast
@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain(case: Case, parity_log: list[str]) -> None:
    """One process."""
    model, stepper = build(case)
    torch_jobs.check_runs([train(stepper, model, case)], case, f"plain-{case}", parity_log)


@pytest.mark.parametrize("job", TORCH, ids=str)
def test_torch(job: torch_jobs.Job, torch_runs: Any, parity_log: list[str]) -> None:
    """DDP reduces its KL gradient once a step, FSDP with every micro-batch: the same step."""
    torch_jobs.check_runs(zero_jobs.runs_of(torch_runs(), job), job.case, str(job), parity_log)


@pytest.mark.parametrize("job", ZERO, ids=str)
def test_zero(job: zero_jobs.Job, zero_runs: Any, parity_log: list[str]) -> None:
    """The KL pass leaves what earlier micro-batches accumulated as it was, wherever DeepSpeed keeps it."""
    torch_jobs.check_runs(zero_jobs.runs_of(zero_runs(), job), job.case, str(job), parity_log)


@pytest.mark.parametrize("job", HALF, ids=str)
def test_zero_bf16(job: zero_jobs.Job, zero_runs: Any) -> None:
    """The same with bf16 passes and fp32 sums, as near to fp32 as bf16 gets."""
    runs, twin = zero_jobs.runs_of(zero_runs(), job), reference(job.case)
    zero_jobs.check_ranks_agree(runs)
    for report, want in zip(runs[0].reports, twin.steps, strict=True):
        assert math.isclose(report.grad_norm, want.grad_norm, rel_tol=0.05) and not report.skipped
    got = torch.cat([runs[0].parameters[name].flatten() for name in twin.parameters])
    want_all = torch.cat([p.flatten() for p in twin.parameters.values()])
    assert (got - want_all).norm() / want_all.norm() < 0.02
