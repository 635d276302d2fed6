"""Heads, labels and lengths of checkpoints that were made for something else."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
)

from rose_ds.attack import Classifier
from rose_ds.cli.arguments import RunArguments
from rose_ds.data import TASKS, TaskSpec, perturb, tokenize
from rose_ds.data.loading import TaskData
from rose_ds.errors import RefusedConfiguration
from rose_ds.experiments.evaluation import Evaluator, Predictions
from rose_ds.experiments.loading import settings_of
from rose_ds.experiments.models import ModelError, check_length, label_order, load_model, weights_digest
from rose_ds.experiments.settings import MethodSettings, RunSettings
from rose_ds.experiments.train import evaluate, train

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


def test_perturbations_beyond_what_is_read_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    def first_letters(texts: list[str], **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": [[ord(letter) for letter in text[:40]] for text in texts]}

    texts = [f"a film that is fine in all its {n} parts" + " and then some more of it" * 9 for n in range(60)]
    rows = Dataset.from_dict({"sentence": texts, "label": [0, 1] * 30, "idx": list(range(60))})
    data = TaskData(spec=TASKS["sst2"], validation=rows)
    Evaluator(data, first_letters, RunSettings(max_length=40), [0, 1])
    (line,) = (r.getMessage() for r in caplog.records if "perturbed texts" in r.getMessage())
    seen = sum(a[:40] != b[:40] for a, b in zip(texts, perturb(rows, ("sentence",), seed=0)["sentence"], strict=True))
    assert line.startswith(f"{60 - seen} of 60 perturbed texts are to the model what they were") and 0 < seen < 60
    short = Dataset.from_dict({"sentence": ["a film that is fine"] * 6, "label": [0, 1] * 3, "idx": list(range(6))})
    caplog.clear()
    Evaluator(TaskData(spec=TASKS["sst2"], validation=short), first_letters, RunSettings(max_length=40), [0, 1])
    assert not caplog.records


def test_what_a_model_was_trained_for_before_is_forgotten(tmp_path: Path) -> None:
    """Several labels at once, or a number: its head goes on as one of classes."""
    for problem in ("multi_label_classification", "regression"):
        config = BertConfig(**SIZES, num_labels=2, problem_type=problem)
        BertForSequenceClassification(config).save_pretrained(tmp_path)
        model = load_model(str(tmp_path), RTE)
        ids, labels = torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, 1])
        found = model(input_ids=ids, labels=labels)
        torch.testing.assert_close(found.loss, torch.nn.functional.cross_entropy(found.logits, labels))


def test_a_decoder_learns_its_padding_from_its_tokenizer(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=2, num_labels=2)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    model = load_model(str(tmp_path), TASKS["sst2"]).eval()
    ids = torch.tensor([[2, 3, 0, 0], [3, 2, 2, 0]])
    both = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
    torch.testing.assert_close(both[0], model(input_ids=ids[:1, :2]).logits[0])


def test_roberta_counts_text_from_behind_its_padding(tmp_path: Path) -> None:
    """Where the tokenizer knows no limit, the model is asked: one token more and its embeddings have no row for it."""
    config = RobertaConfig(**SIZES, num_labels=2)
    model = RobertaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = SimpleNamespace(pad_token_id=config.pad_token_id, model_max_length=10**30)
    check_length(str(tmp_path), tokenizer, 14)
    model(input_ids=torch.full((1, 14), 3))
    with pytest.raises(ModelError, match="more than the 14 tokens"):
        check_length(str(tmp_path), tokenizer, 15)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(input_ids=torch.full((1, 15), 3))
    check_length(str(tmp_path), SimpleNamespace(pad_token_id=1, model_max_length=12), 12)


def test_a_model_without_a_limit_takes_any_length(tmp_path: Path) -> None:
    XLNetConfig(vocab_size=8, d_model=8, n_layer=1, n_head=2, d_inner=8).save_pretrained(tmp_path)
    check_length(str(tmp_path), SimpleNamespace(pad_token_id=0, model_max_length=10**30), 5000)


def test_the_digest_of_a_folders_weights(tmp_path: Path) -> None:
    found = []
    for content in (b"one", b"two", b"one"):
        (tmp_path / "model.safetensors").write_bytes(content)
        found.append(weights_digest(str(tmp_path)))
    assert found[0] == found[2] != found[1]
    assert weights_digest("some/hub-id") != weights_digest("some/other-id")


def test_the_models_own_folder_keeps_its_record(tmp_path: Path) -> None:
    """And so does any other model's."""
    args = SimpleNamespace(output_dir=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    for name in ("config.json", "metrics.json"):
        (tmp_path / "run" / name).write_text("{}")
    for model in ("run", "other"):
        with pytest.raises(ValueError, match="is a model's own folder, whose record of its training stays"):
            evaluate(RunSettings(model=str(tmp_path / model)), args)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), [("prediction_loss_only", True), ("eval_do_concat_batches", False)])
def test_what_leaves_no_answers_is_refused_before_training(name: str, value: bool, tmp_path: Path) -> None:
    args = RunArguments(output_dir=str(tmp_path), use_cpu=True, **{name: value})
    with pytest.raises(RefusedConfiguration, match=f"--{name} {str(value).lower()} leaves no answers to count"):
        train(RunSettings(), MethodSettings(), args)


def test_who_was_not_trained_here_has_to_be_told_the_task(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no metrics.json that says what it was trained on: give --task, or"):
        settings_of(str(tmp_path), {"max_length": 32})
    assert settings_of(str(tmp_path), {"task": "snippets"}).task == "snippets"


def test_logits_that_are_not_finite_are_a_wrong_answer() -> None:
    labels = np.array([0, 0, 1])
    found = Predictions([0, 1, 2], labels, np.array([[1.0, 0.0], [np.nan, 0.0], [0.0, np.inf]], np.float32))
    assert found.scores() == {"accuracy": pytest.approx(1 / 3), "ece": None}
    assert found.record("clean")["prediction"] == [0, -1, -1]
    assert Predictions([0], labels[:1], np.array([[1.0, 0.0]])).scores()["ece"] is not None
