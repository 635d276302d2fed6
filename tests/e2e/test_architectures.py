"""docs/models.md says what happens: every row of it in one process, and some on every engine."""

from __future__ import annotations

import importlib.util
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import models
import pytest
from models import ENGINES, TOLERANCE, Tried, all_models, line_of

#: One of a kind each: what they shard, tie, freeze and share differs.
HANDFUL = [
    "Encoders, sequence classification/deberta-v2",
    "Encoders, sequence classification/albert",
    "Decoders, sequence classification/llama",
    "Causal language models/gpt2",
    "Causal language models/qwen2",
    "Encoder-decoder language models/t5",
    "Image classification/ViT",
    "Adapters/BERT classifier, LoRA",
]
#: (engine, model) that do not work; the page says why.
FAIL = {("FSDP2", "Adapters/BERT classifier in 8 bits, LoRA")}


def missing(name: str) -> str | None:
    """The package that a row needs and that is not installed."""
    needed = (["peft"] if "LoRA" in name else []) + (["bitsandbytes"] if "8 bits" in name else [])
    return next((package for package in needed if importlib.util.find_spec(package) is None), None)


def tried(name: str) -> Tried:
    if missing(name) is not None:
        pytest.skip(f"{missing(name)} is not installed")
    return once(name)


@cache
def once(name: str) -> Tried:
    return models.try_plain(all_models()[name])


def cells(line: str) -> list[str]:
    """Without the name."""
    return line.strip("| ").split(" | ")[1:]


@pytest.mark.parametrize("name", all_models())
def test_row(name: str) -> None:
    """What the default masks, which patterns fit, where the noise is from; and it trains."""
    listed = cells(models.lines_of(models.PAGE.read_text())[name])
    figures = listed[-len(ENGINES) :]
    found = cells(line_of(name, tried(name), figures))
    if f"transformers=={version('transformers')}" not in (models.ROOT / "launch" / "requirements.txt").read_text():
        found[2] = listed[2]  # other releases give the layers other names
    assert found == listed
    for engine, cell in zip(ENGINES, figures, strict=True):
        if (engine, name) in FAIL:
            assert cell.startswith("fails: ")
        else:
            assert cell == "equal" or float(cell) < TOLERANCE


@pytest.fixture(scope="module")
def two_ranks(extensions: Path) -> dict[tuple[str, str], Any]:
    """Figures of the handful, by engine and model."""
    settings = {name: tried(name).settings for name in HANDFUL if missing(name) is None}
    return models.on_two_ranks([(engine, name, settings[name]) for engine in ENGINES[:2] for name in settings])


@pytest.mark.parametrize("name", HANDFUL)
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_finds_the_same(engine: str, name: str, request: pytest.FixtureRequest) -> None:
    """Losses and thresholds of the first steps are those of one process."""
    plain = tried(name)
    if engine == "RoseTrainer":
        found = models.try_trainer(all_models()[name], plain.settings)
    else:
        found = request.getfixturevalue("two_ranks")[engine, name]
    assert not isinstance(found, str), found
    assert found.far_from(plain.figures) < TOLERANCE
    assert len(set(plain.figures.losses)) == models.STEPS, "the model does not train"


def test_no_row_too_many() -> None:
    assert list(models.lines_of(models.PAGE.read_text())) == list(all_models())
