"""Probing sentences, and the number that says what was learned from them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from rose_ds.analysis import pictures, probing
from rose_ds.analysis.load import fresh_classifier
from rose_ds.analysis.msgs import LONG, PARADIGMS, generate, probes, read_folder
from rose_ds.analysis.probing import Training, matthews_correlation, new_head
from rose_ds.cli import probe
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
    rows = [msgs_item(n % 2, n % 2, f"{n}") for n in range(40)]
    for ordered in (rows, rows[::2] + rows[1::2]):  # one label after the other, and sorted by label
        (folder / "train.jsonl").write_text("".join(ordered))
        some = probes("length", tmp_path, (20, 5), 0)[0]
        assert sum(p.linguistic for p in some) == 10
        assert len({int(p.sentence) // 10 for p in some}) == 4  # from everywhere
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


def test_a_new_head_with_a_norm_lets_its_input_through() -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    config = ModernBertConfig(vocab_size=20, pad_token_id=0, norm_bias=True, **sizes)
    model = ModernBertForSequenceClassification(config).eval()
    with torch.no_grad():
        model.head.norm.weight.fill_(3.0)
        model.head.norm.bias.fill_(3.0)
    new_head(model, seed=1)
    assert torch.equal(model.head.norm.weight, torch.ones(8))
    assert not model.head.norm.bias.any()
    logits = model(input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]])).logits
    assert logits.abs().min() > 0 and not torch.equal(logits[0], logits[1])


def save(folder: Path, *labels: str) -> str:
    """A small classifier with a tokenizer."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    BertForSequenceClassification(BertConfig(vocab_size=8, **sizes, **names)).save_pretrained(folder)
    words = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "good"))}
    BertTokenizer(words).save_pretrained(folder)
    return str(folder)


def test_a_fresh_classifier_has_two_labels_and_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The head that it replaces is of any task."""
    for labels in (("entailment", "not_entailment"), ("negative", "neutral", "positive")):
        folder = save(tmp_path / labels[0], *labels)
        with caplog.at_level("WARNING", logger="rose_ds"):
            model, tokenizer = fresh_classifier(folder, seed=3)
        assert not [record for record in caplog.records if record.name.startswith("rose_ds")]
        again, _ = fresh_classifier(folder, seed=3)
        with torch.no_grad():
            one, two = (m.eval()(**tokenizer(["a good film"], return_tensors="pt")).logits for m in (model, again))
        assert one.shape == (1, 2) and torch.equal(one, two)


def test_records_of_other_items_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, msgs = save(tmp_path / "model", "a", "b"), tmp_path / PARADIGMS["length"]
    msgs.mkdir()
    (msgs / "train.jsonl").write_text(msgs_item(1, 1) + msgs_item(0, 0))
    (msgs / "test.jsonl").write_text(msgs_item(1, 0) + msgs_item(0, 1))
    trained: list[int] = []
    monkeypatch.setattr(probing, "linguistic_bias", lambda *a: trained.append(a[-1]) or {"mcc": 0, "train_accuracy": 1})
    monkeypatch.setattr(pictures, "strips", lambda *_: [])
    flags = [model, "--msgs", str(tmp_path), "--surface", "length", "--seeds", "0", "1", "--output_dir", str(tmp_path)]
    probe.run(flags)
    probe.run(flags)
    assert trained == [0, 1]
    (msgs / "test.jsonl").write_text(msgs_item(1, 0) + msgs_item(0, 1, "A corrected sentence."))
    with pytest.raises(ValueError, match=r"is of other settings \(items "):
        probe.run(flags)
