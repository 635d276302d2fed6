"""Probing sentences, and the number that says what was learned from them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from rose_ds.analysis.msgs import LONG, PARADIGMS, generate, probes, read_folder
from rose_ds.analysis.probing import Training, matthews_correlation, new_head
from rose_ds.data import DataError

pytestmark = pytest.mark.fast

RAISING = re.compile(r"\b(seemed|appeared|happened|likely|bound|certain|turned out|proved|tended|about to)\b")
MSGS = Path(__file__).resolve().parents[3] / "shared" / "data" / "MSGS"


@pytest.mark.parametrize("paradigm", sorted(PARADIGMS))
@pytest.mark.parametrize("ambiguous", [True, False])
def test_made_sentences_are_what_their_labels_say(paradigm: str, ambiguous: bool) -> None:
    items = generate(paradigm, ambiguous, 300, seed=3)
    assert len({p.sentence for p in items}) == len(items) == 300
    assert sum(p.linguistic for p in items) == 150
    for p in items:
        words = p.sentence.rstrip(".").lower().split()
        assert (p.linguistic == 0) == bool(RAISING.search(p.sentence)), p
        surface = "the" in words if paradigm == "lexical" else len(words) >= LONG
        assert p.surface == surface, p
        assert (p.linguistic == p.surface) == ambiguous
        assert p.sentence[0].isupper()
        assert p.sentence.endswith(".")
    assert items == generate(paradigm, ambiguous, 300, seed=3)
    assert items != generate(paradigm, ambiguous, 300, seed=4)


def msgs_item(linguistic: int, surface: int, sentence: str = "Anna tried to run.") -> str:
    labels = {"linguistic_feature_label": linguistic, "surface_feature_label": surface}
    return json.dumps({"sentence": sentence, **labels, "UID": "x"}) + "\n"


def test_a_folder_in_msgs_layout(tmp_path: Path) -> None:
    folder = tmp_path / PARADIGMS["length"]
    folder.mkdir()
    (folder / "train.jsonl").write_text(msgs_item(1, 1) + msgs_item(0, 0, "Anna seemed to run."))
    (folder / "test.jsonl").write_text(msgs_item(1, 0) + msgs_item(0, 1))
    train, test = read_folder(tmp_path, "length")
    assert [(p.sentence, p.linguistic, p.surface) for p in train] == [
        ("Anna tried to run.", 1, 1),
        ("Anna seemed to run.", 0, 0),
    ]
    assert [(p.linguistic, p.surface) for p in test] == [(1, 0), (0, 1)]
    assert [len(part) for part in probes("length", tmp_path, (1, 5), 0)] == [1, 2]
    with pytest.raises(DataError, match=rf"cannot read .*{PARADIGMS['lexical']}"):
        read_folder(tmp_path, "lexical")
    for content, message in (
        ("{", r"test\.jsonl:1: not an item of MSGS"),
        ('{"sentence": "a"}\n', r"test\.jsonl:1: not an item of MSGS \('linguistic_feature_label'\)"),
        (msgs_item(1, 0) + msgs_item(1, 1), r"test\.jsonl:2: labels \(1, 1\): .*must differ"),
        ("", "has no items"),
    ):
        (folder / "test.jsonl").write_text(content)
        with pytest.raises(DataError, match=message):
            read_folder(tmp_path, "length")


@pytest.mark.skipif(not MSGS.is_dir(), reason="no folder with MSGS beside the checkout")
@pytest.mark.parametrize("paradigm", sorted(PARADIGMS))
def test_real_msgs_loads_whole(paradigm: str) -> None:
    train, test = read_folder(MSGS, paradigm)
    assert (len(train), len(test)) == ({"lexical": 2000, "length": 1000}[paradigm], 1000)


def test_matthews_correlation() -> None:
    """Against its definition by counts, and scikit-learn where it is installed."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        a, b = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
        tp, tn = int((a & b).sum()), int(((1 - a) & (1 - b)).sum())
        fp, fn = int((a & (1 - b)).sum()), int(((1 - a) & b).sum())
        want = (tp * tn - fp * fn) / np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
        assert matthews_correlation(a.tolist(), b.tolist()) == pytest.approx(want)
    assert matthews_correlation([0, 1, 1], [0, 1, 1]) == pytest.approx(1)
    assert matthews_correlation([1, 0, 0], [0, 1, 1]) == pytest.approx(-1)
    assert matthews_correlation([1, 1, 1], [0, 1, 1]) == 0
    metrics = pytest.importorskip("sklearn.metrics")
    assert matthews_correlation(a.tolist(), b.tolist()) == pytest.approx(metrics.matthews_corrcoef(b, a))


def test_a_new_head_leaves_the_rest() -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, **sizes))
    with torch.no_grad():
        model.classifier.bias.fill_(3.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    new_head(model, seed=1)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert not model.classifier.bias.any()
    assert 0 < model.classifier.weight.std() < 0.1
    with pytest.raises(ValueError, match="epochs=0 must be at least 1"):
        Training(epochs=0)
