"""Invariant 1 with the compiled kernels: engines that hold their fp32 weights on the CPU, offload too."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_jobs import build as build_plain
from spawn import run_ranks
from test_methods import case_of, job_of, run_engine
from tiny import Case, make_model, micro_batch, parameter_groups
from torch_jobs import check_runs
from zero_jobs import runs_of

from rose_ds import kernels
from rose_ds.core.update import UpdateBatch
from rose_ds.kernels import build

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

CASES = [
    case_of("task", "none"),
    case_of("task", "ensemble"),
    case_of("task", "second", 1),
    case_of("r-drop", "ensemble"),
    case_of("task", "first-tensor", 1),
    case_of("task", "ensemble-tensor"),
    case_of("task", "child-tuning", 1),
    case_of("task", "random", 1),
    case_of("r-drop", "gradient-mask"),
    case_of("task", "ensemble", keep_first="auto", first_order="fast", risk_ema=0.5),
]
ENGINES = ("ddp", "fsdp2", "zero1", "zero2-offload", "zero3-offload")


def run_with_kernels(rank: int, world: int, jobs: list[Any]) -> Any:
    os.environ[kernels.VARIABLE] = "cpp"
    used: list[bool] = []
    from rose_ds.core import update

    original = update.UpdateBatch.flush

    def flush(self: Any) -> None:
        used.append(bool(self.compiled) and not self.free and not self.masked)
        original(self)

    update.UpdateBatch.flush = flush  # type: ignore[method-assign]
    results = run_engine(rank, world, jobs)
    assert used, "nothing was updated"
    assert all(used), "torch updated something"
    return results


@pytest.mark.parametrize("engine", ENGINES)
def test_parity(engine: str, extensions: Path, parity_log: list[str]) -> None:
    build.extension.cache_clear()
    assert build.extension() is not None  # once, before several ranks want it
    jobs = [job_of(engine, case, "fp32") for case in CASES]
    found = run_ranks(run_with_kernels, 2, jobs, timeout=200, process_group="zero" not in engine)
    for case, job in zip(CASES, jobs, strict=True):
        check(case, runs_of(found, job), f"{engine}-kernels-{case}", parity_log)


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("enough", [True, False])
def test_adamw_without_masks(
    enough: bool, foreach: bool | None, extensions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default compiled for a model that is large enough, though none of it is eligible; torch's where one asks."""
    build.extension.cache_clear()
    monkeypatch.setattr(kernels, "LARGE", sum(p.numel() for p in make_model(Case()).parameters()) + (not enough))
    used: list[bool] = []
    original = UpdateBatch.flush
    monkeypatch.setattr(UpdateBatch, "flush", lambda self: (used.append(bool(self.compiled)), original(self)))
    case = Case("none", clip=0.0)
    model, stepper = build_plain(case, foreach=foreach)
    twin = make_model(case)
    adam = torch.optim.AdamW(parameter_groups(case, twin, named=False), foreach=foreach)
    for t in range(1, 4):
        ids, labels = micro_batch(case, t, 0)
        for module in (model, twin):
            module.eval()
        stepper.backward(lambda ids=ids: model(ids), lambda z, labels=labels: F.cross_entropy(z, labels))
        stepper.step()
        F.cross_entropy(twin(ids), labels).backward()
        adam.step()
        adam.zero_grad()
    wanted = enough and foreach is None
    assert used == [wanted] * 3
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        if wanted:
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(mine, other)


def check(case: Case, runs: Any, name: str, log: list[str]) -> None:
    check_runs(runs, case, name, log)
