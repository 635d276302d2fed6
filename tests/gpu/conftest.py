"""The command for a machine with a GPU: ``python -m pytest tests/gpu --gpu-json results/gpu.json``.

Runs everything that no machine without one can tell, and writes each test's verdict and figures to one file, with the
device and the versions. ``--gpu-rehearsal`` runs the same tests on the CPU, where what only a GPU has is left out.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rose_ds.experiments import provenance

FORMAT = 1
_REPORT = pytest.StashKey["Report"]()


class Report:
    """Collects what the tests find, and writes it where it was asked for."""

    def __init__(self, path: str | None, rehearsal: bool) -> None:
        self.path, self.rehearsal = path, rehearsal
        self.verdicts: dict[str, dict[str, Any]] = {}
        self.figures: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.verdicts.setdefault(_name(report.nodeid), {"verdict": "passed", "seconds": 0.0})
        test["seconds"] = round(test["seconds"] + report.duration, 2)
        if report.outcome != "passed":
            test["verdict"] = report.outcome
            test["why"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)[-2000:]

    def pytest_sessionfinish(self) -> None:
        if self.path and self.verdicts:
            tests = {name: {**verdict, **self.figures.get(name, {})} for name, verdict in self.verdicts.items()}
            path = Path(self.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record(tests, rehearsal=self.rehearsal), indent=1) + "\n", encoding="utf-8")


def _name(nodeid: str) -> str:
    return nodeid.partition("::")[2]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu")
    group.addoption("--gpu-json", metavar="PATH", help="write verdicts and figures of tests/gpu to this file")
    group.addoption("--gpu-rehearsal", action="store_true", help="run tests/gpu on the CPU, to test the tests")


def pytest_configure(config: pytest.Config) -> None:
    path, rehearsal = config.getoption("--gpu-json", None), config.getoption("--gpu-rehearsal", False)
    if path and not (torch.cuda.is_available() or rehearsal):
        raise pytest.UsageError(
            f"--gpu-json: torch {torch.__version__} finds no CUDA device here, so there is nothing to measure and "
            "nothing was written; `rose-ds doctor` says why a device is not found"
        )
    config.stash[_REPORT] = Report(path, rehearsal)
    if path:
        config.pluginmanager.register(config.stash[_REPORT], "gpu-report")


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """The GPU; without one every test that asks is skipped, but for a rehearsal."""
    if pytestconfig.getoption("--gpu-rehearsal", False):  # unknown where the whole suite runs
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str, Any], None]:
    """Takes a name and a number (or a record of numbers) for the report, whatever becomes of the test."""
    return request.config.stash[_REPORT].figures.setdefault(_name(request.node.nodeid), {}).__setitem__


def record(tests: dict[str, Any], *, rehearsal: bool) -> dict[str, Any]:
    """What the file holds: where it was measured, with what, and every test's verdict and figures."""
    name = "the CPU, in rehearsal" if rehearsal else torch.cuda.get_device_name()
    versions: dict[str, Any] = {**provenance.packages(), "cuda": torch.version.cuda, "system": platform.release()}
    try:
        import triton
    except ImportError:
        versions["triton"] = None
    else:
        versions["triton"] = triton.__version__
    if not rehearsal and torch.distributed.is_nccl_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    verdicts = [test["verdict"] for test in tests.values()]
    return {
        "format": FORMAT,
        "device": name,
        "devices": 0 if rehearsal else torch.cuda.device_count(),
        "commit": provenance.commit(),
        "versions": versions,
        "kernels": os.environ.get("ROSE_DS_KERNELS", "auto"),
        "verdicts": {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))},
        "tests": tests,
    }
