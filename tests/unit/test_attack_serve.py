"""A classifier as attacks see it, in this process and over the pipe of ``rose_ds.attack.serve``."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from rose_ds.attack import Classifier
from rose_ds.attack.serve import serve
from rose_ds.data import TASKS
from rose_ds.experiments.metrics import Metrics

ROOT = Path(__file__).parents[2]
WORDS = ["[PAD]", "[UNK]", "good", "bad", "film", "music"]
TEXTS = ["good film", "bad", "bad music and good film", "good", "music bad film"]


def saved(folder: Path, *labels: str) -> Path:
    """A tiny classifier, of sixteen positions."""
    torch.manual_seed(0)
    config = BertConfig(
        **{"vocab_size": len(WORDS), "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        **{"intermediate_size": 8, "max_position_embeddings": 16, "initializer_range": 0.5},
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 16}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run of SST-2, whose labels the model has in another order, and which cut texts to twelve tokens."""
    saved(tmp_path, "positive", "negative")
    Metrics("sst2", "tiny", config={"task": "sst2", "max_length": 12}).write(tmp_path)
    return tmp_path


@pytest.mark.fast
def test_the_task_and_length_are_those_of_the_run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model, told = Classifier(str(folder)), Classifier(str(folder), TASKS["sst2"], max_length=12)
    assert (model.order, model.max_length) == ([1, 0], 12)
    assert np.array_equal(model.predict(TEXTS), told.predict(TEXTS))
    own = Metrics("sst2", "tiny", config={"task": "sst2", "max_length": 12, "validation_file": "own.csv"})
    own.write(folder)  # whose labels are the model's
    assert Classifier(str(folder)).order == [0, 1]
    foreign = saved(tmp_path_factory.mktemp("foreign"), "yes", "maybe", "no")
    assert Classifier(str(foreign), max_length=16).order == [0, 1, 2]
    for name, value, least in (("batch_size", -1, 1), ("max_length", 0, 8)):
        with pytest.raises(ValueError, match=f"{name}={value} must be at least {least}"):
            Classifier(str(folder), **{name: value})


@pytest.mark.fast
def test_texts_of_the_same_tokens_are_read_once(folder: Path) -> None:
    """And each of them has its answer, whatever the order."""
    model = Classifier(str(folder), batch_size=2)
    long = " ".join(["good", "bad", "film"] * 4)  # twelve tokens
    texts = [f"{long} music", "good film", f"{long} muscic", "goood film", f"{long} film good", "gooood film", ""]
    alone = np.concatenate([model.predict([text]) for text in texts])
    sizes = list[tuple[int, ...]]()
    model.model.register_forward_pre_hook(
        lambda _, arguments, given: sizes.append(given["input_ids"].shape), with_kwargs=True
    )
    together = model.predict(texts)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert len(np.unique(together, axis=0)) == 4
    assert sizes == [(2, 2), (2, 12)]  # the empty one and "good film"; that with an unknown word and the long one
    assert model.predict([]).shape == (0, 2)
    pairs = [("good", "film music"), ("good film", "bad"), ("good", "film music")]
    alone = np.concatenate([model.predict([pair]) for pair in pairs])
    np.testing.assert_allclose(model.predict(pairs), alone, atol=1e-5)


def lengths(texts: Sequence[tuple[str, ...]]) -> np.ndarray:
    return np.array([[len(text), len(text[0])] for text in texts])


@pytest.mark.fast
@pytest.mark.parametrize(
    ("line", "reply"),
    [
        ('["good", "a film"]', [[1, 4], [1, 6]]),
        ('[["good", "film"], ["a", "b"]]', [[2, 4], [2, 1]]),
        ("[]", []),
        ('["caf\\u00e9 \\ud83d\\ude00"]', [[1, 6]]),
        ("good", "line 1: Expecting value: line 1 column 1 (char 0)"),
        ("", "line 1: Expecting value"),
        ("[" * 100_000, "line 1: maximum recursion depth exceeded"),
        ('{"good": 1}', "line 1: expected a JSON list of texts, or of lists of two texts"),
        ("[1]", "line 1: expected a JSON list"),
        ("[[]]", "line 1: expected a JSON list"),
        ('[["a", "b", "c"]]', "line 1: expected a JSON list"),
        ('["a", ["b", "c"]]', "line 1: one and two texts in one list"),
        ('["\\ud800"]', "line 1: 'utf-8' codec can't encode character"),
    ],
)
def test_lines(line: str, reply: Any) -> None:
    """Each has one reply, and the one after it has its own."""
    replies = io.StringIO()
    serve(lambda texts: lengths(texts) if texts else np.zeros((0, 2)), [f"{line}\n", '["after"]\n'], replies)
    first, second = map(json.loads, replies.getvalue().splitlines())
    assert second == [[1, 5]]
    if isinstance(reply, list):
        assert first == reply
    else:
        assert list(first) == ["error"] and first["error"].startswith(reply)


def documented_wrapper(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class in docs/attack.md, without the library that it is made for."""
    page = (ROOT / "docs" / "attack.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(import json.*?)```", page, re.DOTALL)
    assert code is not None
    base = SimpleNamespace(models=SimpleNamespace(wrappers=SimpleNamespace(ModelWrapper=object)))
    monkeypatch.setitem(sys.modules, "textattack", base)
    found: dict[str, Any] = {}
    exec(code[1], found)
    return found["RoseModel"]


def started(*words: str) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *words], **pipes, encoding="utf-8", env=env)


def test_a_model_behind_a_pipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers a line before it has the next, as the model itself would, and ends with its input."""
    expected = Classifier(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    wrapper = documented_wrapper(monkeypatch)(sys.executable, str(folder))
    for texts in (TEXTS, [("good", "film"), ("bad", "music")], ["caf\u00e9"]):
        np.testing.assert_allclose(wrapper(texts), expected.predict(texts), atol=1e-5)
    with pytest.raises(RuntimeError, match="line 4: expected a JSON list of texts"):
        wrapper([1])
    assert wrapper(["good"]).shape == (1, 2)
    rest, _ = wrapper.process.communicate(timeout=100)
    assert (wrapper.process.returncode, rest) == (0, "")


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    process = started("-m", "rose_ds.attack.serve", "--model", str(tmp_path / "none"))
    out, errors = process.communicate("[]\n", timeout=100)
    assert (process.returncode, out) == (2, "")
    assert errors.splitlines()[-1].startswith("python -m rose_ds.attack.serve: error: model folder ")


#: A model that says what it does.
NOISY = """
import numpy, os
from rose_ds.attack import serve

class Noisy:
    def __init__(self, *_, **given):
        print("loaded")

    def predict(self, texts):
        print("predicting")
        os.write(1, b"predicted")
        return numpy.zeros((len(texts), 2))

serve.Classifier = Noisy
serve.main(["--model", "any"])
"""


def test_what_a_library_prints_does_not_stand_between_replies() -> None:
    out, errors = started("-c", NOISY).communicate('["a"]\n["b"]\n', timeout=100)
    assert out.splitlines() == ["[[0.0, 0.0]]"] * 2, errors
    assert "loaded" in errors and errors.count("predicted") == 2
