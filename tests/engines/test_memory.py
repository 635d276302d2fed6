"""benchmarks/memory.py on a small model: what ROSE costs in memory, and that ranks share it out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "memory.py"
RUNS = {("none", 2), ("ensemble", 2), ("ensemble", 1)}
MB = 1e6


def measure(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(PROGRAM),
        "--model",
        "small",
        "--timeout",
        "180",
        "--output",
        str(output),
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)


@pytest.fixture(scope="module")
def runs(extensions: object, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two steps at ZeRO-3 in bf16: a run for each strategy and number of ranks."""
    output = tmp_path_factory.mktemp("memory") / "memory.json"
    for strategies, ranks in ((["none", "ensemble"], "2"), (["ensemble"], "1")):
        done = measure(output, "--ranks", ranks, "--strategy", *strategies)
        assert done.returncode == 0, done.stderr[-4000:]
    again = measure(output, "--ranks", "2", "--strategy", "none", "ensemble")
    assert again.returncode == 0 and again.stderr.count("in the file") == 2, "what is known is not measured again"
    assert len(again.stdout.splitlines()) == 2 + len(RUNS)
    found = json.loads(output.read_text())["runs"].values()
    return {f"{run['strategy']} x{run['ranks']}": run for run in found}


def highest(run: dict[str, Any], phase: str, when: str = "peak") -> float:
    return max(rank[phase][when] for rank in run["ranks_phases"])


def test_what_rose_costs(runs: Any) -> None:
    """Above AdamW: while gradients are taken, the fp32 KL gradient of the rank's share, and neither whole gradients nor
    whole weights; in the step, a byte and the risks (fp32, for shards as small as this); between steps, the kernels'
    masks (two bits) and lists of risks near the thresholds. Constants: the second pass's activations, more code."""
    rose, plain = runs["ensemble x2"], runs["none x2"]
    share = rose["parameters"] / 2
    backward, step = (highest(rose, phase) - highest(plain, phase) for phase in ("backward", "step"))
    assert 3.5 * share < backward < 4.5 * share + 6 * MB
    assert step < 5 * share + 8 * MB
    assert highest(rose, "step", "after") - highest(plain, "step", "after") < 0.75 * share + 4 * MB


def test_ranks_share_it_out(runs: Any) -> None:
    """Weights, gradient (bf16), master, moments and KL gradient: 20 bytes a parameter, of which two ranks have half."""
    one, two = runs["ensemble x1"], runs["ensemble x2"]
    saved = highest(one, "backward") - highest(two, "backward")
    assert 0.85 * 10 < saved / one["parameters"] < 1.15 * 10
    assert highest(two, "model", "after") < 0.6 * highest(one, "model", "after"), "built in parts"
