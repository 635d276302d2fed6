"""Invariant 1 with the compiled kernels: engines that hold their fp32 weights on the CPU, offload too."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from reference import check_parity, reference
from spawn import run_ranks
from test_methods import case_of, job_of, run_engine
from tiny import Case
from torch_jobs import check_runs
from zero_jobs import runs_of

from rose_ds import kernels
from rose_ds.kernels import build

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

CASES = [
    case_of("task", "none"),
    case_of("task", "ensemble"),
    case_of("task", "second", 1),
    case_of("r-drop", "ensemble"),
    case_of("task", "first-tensor", 1),
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


def check(case: Case, runs: Any, name: str, log: list[str]) -> None:
    check_runs(runs, case, name, log)
    assert check_parity(runs[0].parameters, reference(case)).error < 1e-3
