"""Environment of every test, and DeepSpeed's one compiled extension."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

# before torch is imported, and for every process a test starts
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")
_GPU = Path(__file__).parent / "gpu"
_given = [Path(word.partition("::")[0]).resolve() for word in sys.argv[1:] if not word.startswith("-")]
if "PYTEST_XDIST_WORKER" not in os.environ and not any(path.is_relative_to(_GPU) for path in _given):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks are on CPUs, whatever the machine has; workers inherit it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# glibc reads it when a process starts: large tensors in huge pages, a quarter less of a training process's CPU time
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")

_BUILD = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()"


@pytest.fixture(scope="session")
def package_index() -> Callable[[], AbstractContextManager[None]]:
    """Around what pip fetches: a skip where no package index can be reached, and for that alone."""

    @contextmanager
    def reached() -> Iterator[None]:
        from rose_ds.data import DataError

        try:
            yield
        except DataError as error:
            unreachable = ("No matching distribution", "Max retries", "Connection", "timed out", "no answer within")
            if not any(sign in str(error) for sign in unreachable):
                raise
            pytest.skip(f"pip cannot reach an index: {error}")

    return reached


@pytest.fixture(scope="session")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TORCH_EXTENSIONS_DIR with DeepSpeed's communication extension built, once, before several ranks want it.

    An existing TORCH_EXTENSIONS_DIR is used unless it holds the lock of a build that runs or was killed: a rank would
    wait for that lock for ever. Needed by every test that starts DeepSpeed.
    """
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(given) if given else _shared(tmp_path_factory)
    if any(folder.glob("*/lock")):
        folder = _shared(tmp_path_factory)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "tests.lock"):
        if not list(folder.glob("deepspeed_shm_comm/*.so")):
            subprocess.run([sys.executable, "-c", _BUILD], check=True, timeout=400, stdout=subprocess.DEVNULL)
    return folder


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run that pytest-xdist's workers have in common."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "torch_extensions"


_PARITY = pytest.StashKey[list[str]]()


@pytest.fixture
def parity_log(request: pytest.FixtureRequest) -> list[str]:
    """Lines that the terminal summary shows: how close engines come to the twin, and risks near tau."""
    return request.config.stash.setdefault(_PARITY, [])


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist, whose terminal nobody sees
        session.config.workeroutput["parity"] = session.config.stash.get(_PARITY, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    node.config.stash.setdefault(_PARITY, []).extend(getattr(node, "workeroutput", {}).get("parity", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(_PARITY, [])
    if lines:
        terminalreporter.section(f"parity with the single-process twin: {len(lines)} runs")
        for line in lines:
            terminalreporter.write_line(line)
