"""The command of tests/gpu where there is no GPU: it says so and writes nothing; and its tests run, in rehearsal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def command(*options: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", *options]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", "PYTEST_ADDOPTS": ""}
    return subprocess.run(line, cwd=ROOT, env=hidden, capture_output=True, text=True, timeout=500, check=False)


def test_without_a_gpu(tmp_path: Path) -> None:
    where = tmp_path / "results" / "gpu.json"
    ran = command("--gpu-json", str(where))
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"torch {torch.__version__} finds no CUDA device here" in ran.stderr
    assert "nothing was written" in ran.stderr
    assert not where.parent.exists()


def test_every_test_is_skipped_with_a_reason() -> None:
    ran = command()
    last = ran.stdout.splitlines()[-1]
    assert re.fullmatch(r"\d{2,} skipped in .*", last), ran.stdout[-3000:]
    assert "no CUDA device" in ran.stdout


def test_rehearsal(tmp_path: Path) -> None:
    """What can run on a CPU of the tests, and the file they write; engines beside these have tests of their own."""
    where = tmp_path / "results" / "gpu.json"
    ran = command("--gpu-rehearsal", "--gpu-json", str(where), "-k", "not parity or torch-fsdp2-2 or torch-zero2-1")
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
    found: dict[str, Any] = json.loads(where.read_text())
    assert found["device"] == "the CPU, in rehearsal"
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["verdicts"]) == {"passed", "skipped"}
    tests = found["tests"]
    assert sum(found["verdicts"].values()) == len(tests)
    assert tests["test_masks_are_the_cpus[triton-normal-torch.float32]"]["why"].endswith("TRITON_INTERPRET=1")
    assert tests["test_bf16_at_batch_1"]["steps"] == 30
    assert tests["test_parity[torch-fsdp2-2]"]["verdict"] == "passed"
    assert len(tests["test_parity[torch-fsdp2-2]"]) == 2 + 6, "a figure for each case"
    assert tests["test_time"]["milliseconds of a step()"].keys() == {
        f"torch, {strategy}" for strategy in ("none", "first", "second", "ensemble", "cautious")
    }
