"""Heads, labels and lengths of checkpoints that were made for something else."""

from __future__ import annotations

import logging
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
from rose_ds.data import TASKS, TaskSpec, tokenize
from rose_ds.data.loading import TaskData
from rose_ds.experiments.evaluation import Evaluator
from rose_ds.experiments.models import ModelError, check_length, label_order, load_model, weights_digest
from rose_ds.experiments.settings import RunSettings
from rose_ds.experiments.train import evaluate

RTE = TASKS["rte"]
SIZES: dict[str, Any] = {
    **{"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8},
    "max_position_embeddings": 16,
}


def saved(folder: Path, *labels: str) -> str:
    torch.manual_seed(0)
    config = BertConfig(**SIZES, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)})
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (("entailment", "not_entailment"), [0, 1]),
        (("NOT ENTAILMENT", "Entailment"), [1, 0]),
        (("LABEL_0", "LABEL_1"), [0, 1]),
    ],
)
def test_labels_by_name(labels: tuple[str, ...], order: list[int], tmp_path: Path) -> None:
    """A head keeps its order of labels, and its weights."""
    where = saved(tmp_path, *labels)
    for trained in (True, False):
        model = load_model(where, RTE, trained=trained)
        assert label_order(model.config, RTE) == order
        assert torch.equal(
            model.classifier.weight, BertForSequenceClassification.from_pretrained(where).classifier.weight
        )
        assert [model.config.id2label[i] for i in order] == list(RTE.labels)


def test_weights_are_fp32_whatever_they_were_saved_as(tmp_path: Path) -> None:
    BertForSequenceClassification(BertConfig(**SIZES)).to(torch.bfloat16).save_pretrained(tmp_path)
    for trained in (True, False):
        model = load_model(str(tmp_path), TaskSpec("mine", ("text",), ("no", "yes")), trained=trained)
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_empty_texts_and_a_tokenizer_that_puts_nothing_around_them(tmp_path: Path) -> None:
    """A search asks what a text says without its first word."""
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    tokenizer.save_pretrained(saved(tmp_path, "no", "yes"))
    classifier = Classifier(str(tmp_path), TaskSpec("mine", ("text",), ("no", "yes")), max_length=8, batch_size=2)
    assert np.isfinite(classifier.predict(["", "", "good bad"])).all()


def test_labels_that_only_case_tells_apart(tmp_path: Path) -> None:
    """By their exact names, or not at all."""
    own = TaskSpec("mine", ("text",), ("Bug", "Feature", "bug"))
    model = load_model(saved(tmp_path / "exact", "bug", "Feature", "Bug"), own, trained=True)
    assert label_order(model.config, own) == [2, 1, 0]
    with pytest.raises(ModelError, match="labels are"):
        load_model(saved(tmp_path / "plain", "BUG", "feature", "bug"), own, trained=True)


def test_other_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    where = saved(tmp_path, "negative", "positive")
    with pytest.raises(ModelError, match=r"labels are \['negative', 'positive'\], those of task rte"):
        load_model(where, RTE, trained=True)
    load_model(where, RTE)
    assert "the head goes on as the task's" in caplog.text


def test_a_head_of_another_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The usual way from MNLI to RTE: the encoder stays, the head is new."""
    where = saved(tmp_path, "entailment", "neutral", "contradiction")
    with pytest.raises(ModelError, match="has 3 labels, task rte has 2"):
        load_model(where, RTE, trained=True)
    with caplog.at_level(logging.INFO, "rose_ds"):
        model = load_model(where, RTE)
    assert "a new head" in caplog.text
    assert model.classifier.out_features == 2
    old = BertForSequenceClassification.from_pretrained(where)
    assert all(torch.equal(p, q) for p, q in zip(model.bert.parameters(), old.bert.parameters(), strict=True))


def test_lengths(tmp_path: Path) -> None:
    where = saved(tmp_path, *RTE.labels)
    tokenizer = SimpleNamespace(pad_token_id=0, model_max_length=10**30)
    check_length(where, tokenizer, 16)
    with pytest.raises(ModelError, match="--max_length 17 is more than the 16 tokens"):
        check_length(where, tokenizer, 17)
    with pytest.raises(ModelError, match="has no padding token"):
        check_length(where, SimpleNamespace(pad_token_id=None, model_max_length=16), 8)


def test_answers_are_kept_in_the_tasks_order() -> None:
    """Whatever the model's order: what is right stays right, and logits lie under their labels."""
    import numpy as np
    from datasets import Dataset

    def tokenizer(*texts: list[str], **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": [[1] * (i + 1) for i in range(len(texts[0]))]}

    rows = Dataset.from_dict({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0, 1], "idx": [0, 1]})
    assert tokenize(rows, RTE, tokenizer, 8, [1, 0])["labels"] == [1, 0]  # type: ignore[arg-type]
    data = TaskData(spec=RTE, adversarial=rows)
    evaluator = Evaluator(data, tokenizer, SimpleNamespace(max_length=8), [1, 0])  # type: ignore[arg-type]
    logits = np.array([[-2.0, 3.0], [1.0, 0.0]])  # right, right: the model's label 1 is entailment
    labels = np.array(evaluator.rows["adversarial"]["labels"])
    scores = evaluator.compute_metrics(SimpleNamespace(predictions=logits, label_ids=labels))
    assert scores["accuracy"] == 1.0
    assert evaluator._latest[1].tolist() == [0, 1] and evaluator._latest[0].argmax(1).tolist() == [0, 1]


def test_the_digest_of_a_folders_weights(tmp_path: Path) -> None:
    found = []
    for content in (b"one", b"two", b"one"):
        (tmp_path / "model.safetensors").write_bytes(content)
        found.append(weights_digest(str(tmp_path)))
    assert found[0] == found[2] != found[1]
    assert weights_digest("some/hub-id") != weights_digest("some/other-id")


def test_the_models_own_folder_keeps_its_record(tmp_path: Path) -> None:
    args = SimpleNamespace(output_dir=str(tmp_path / "run" / ".." / "run"))
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="is the model's own folder, whose record of its training stays"):
        evaluate(RunSettings(model=str(tmp_path / "run")), args)  # type: ignore[arg-type]
