"""RoseTrainer in one process: with strategy "none" it is Trainer, feature by feature; and what it refuses."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from rose_ds import RefusedConfiguration, RoseConfig
from rose_ds.data import get_task, load_task, padding_collator, tokenize
from rose_ds.experiments.models import resolve
from rose_ds.training.trainer import RoseTrainer


@pytest.fixture(scope="module")
def parts(minilm: str, snippets: str) -> dict[str, Any]:
    where = resolve(minilm)
    tokenizer = AutoTokenizer.from_pretrained(where)
    rows = load_task(snippets, splits=("train",)).train
    assert rows is not None
    rows = rows.select(range(0, len(rows), len(rows) // 40))
    return {
        "where": where,
        "train_dataset": tokenize(rows, get_task(snippets), tokenizer, 32),
        "data_collator": padding_collator(tokenizer),
    }


def make(cls: type[Trainer], parts: dict[str, Any], out: Path, more: dict[str, Any], **kwargs: Any) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        "optim": "adamw_torch",
    }
    args = TrainingArguments(**{**settings, **more})
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(parts["where"], num_labels=2)
    return cls(
        model=model,
        args=args,
        train_dataset=parts["train_dataset"],
        data_collator=parts["data_collator"],
        **kwargs,
    )


class SignalHandler(TrainerCallback):
    """What SIGTERM does while training."""

    handler: Any = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_sigterm_is_caught_only_where_there_is_something_to_save(
    save_strategy: str, parts: dict[str, Any], tmp_path: Path
) -> None:
    seen = SignalHandler()
    more = {"save_strategy": save_strategy, "max_steps": 1, "save_steps": 10}
    make(RoseTrainer, parts, tmp_path, more, rose=RoseConfig(strategy="second"), callbacks=[seen]).train()
    assert (seen.handler is signal.SIG_DFL) == (save_strategy == "no")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


FEATURES: dict[str, dict[str, Any]] = {
    "default": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "warm-up and betas": {"warmup_steps": 2, "adam_beta2": 0.98, "lr_scheduler_type": "linear"},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_none_is_trainer(feature: str, parts: dict[str, Any], tmp_path: Path) -> None:
    """Same losses, gradient norms and weights as transformers' own loop with torch's AdamW."""
    ours = make(RoseTrainer, parts, tmp_path, FEATURES[feature], rose=RoseConfig(strategy="none"))
    theirs = make(Trainer, parts, tmp_path, FEATURES[feature])
    theirs.model_accepts_loss_kwargs = False  # a sequence classifier's loss is a mean, whatever its signature says
    for trainer in (ours, theirs):
        torch.manual_seed(1)  # dropout
        trainer.train()
    logs = [[(e["loss"], e["grad_norm"]) for e in t.state.log_history if "loss" in e] for t in (ours, theirs)]
    assert logs[0] == logs[1]
    for (name, mine), their in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(mine, their), name


@pytest.mark.parametrize("feature", FEATURES)
def test_rose_trains_with(feature: str, parts: dict[str, Any], tmp_path: Path) -> None:
    """Each feature under the ensemble: thresholds in the log, and every callback of a step called."""
    called: list[str] = []

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            called.append("before")

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            called.append("after")

    trainer = make(
        RoseTrainer, parts, tmp_path, FEATURES[feature], rose=RoseConfig(keep_first=0.5), callbacks=[Recorder()]
    )
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    log = [e for e in trainer.state.log_history if "loss" in e]
    assert len(log) == 3
    assert all(e["rose/tau_first"] > 0 and 0.5 <= e["rose/kept_first"] < 0.51 for e in log)
    assert called == ["before", "after"] * 3
    assert any(not torch.equal(p, start[n]) for n, p in trainer.model.named_parameters())


def test_compute_loss_func_and_its_scale(parts: dict[str, Any], tmp_path: Path) -> None:
    """A loss of the user's, normalised over the accumulated batch as transformers asks for, is not divided again."""

    def summed(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    more = {"gradient_accumulation_steps": 2}
    ours = make(RoseTrainer, parts, tmp_path, more, rose=RoseConfig(strategy="none"), compute_loss_func=summed)
    theirs = make(Trainer, parts, tmp_path, more, compute_loss_func=summed)
    for trainer in (ours, theirs):
        torch.manual_seed(1)
        trainer.train()
    norms = [[e["grad_norm"] for e in t.state.log_history if "loss" in e] for t in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


@pytest.mark.parametrize("strategy", ["none", "first", "ensemble"])
def test_a_loss_that_is_not_finite_changes_nothing(strategy: Any, parts: dict[str, Any], tmp_path: Path) -> None:
    calls: list[int] = []

    def broken(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        calls.append(1)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
        return loss * float("nan") if trainer.state.global_step == 1 else loss

    rose = RoseConfig(strategy=strategy)
    trainer = make(RoseTrainer, parts, tmp_path, {}, rose=rose, compute_loss_func=broken)
    weights: list[torch.Tensor] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))

    trainer.add_callback(Watch())
    trainer.train()
    assert torch.equal(weights[0], weights[1])  # the second step was skipped
    assert not torch.equal(weights[1], weights[2])
    assert torch.isfinite(weights[2]).all()
    skipped = [e["rose/skipped"] for e in trainer.state.log_history if "rose/skipped" in e]
    assert skipped == [0.0, 1.0, 0.0]


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"fp16": True}, {}, "fp16=True .* without DeepSpeed"),
    ({}, {"optimizers": (torch.optim.SGD([torch.zeros(1, requires_grad=True)]), None)}, "remove optimizers="),
    ({}, {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {})}, "optimizer_cls_and_kwargs"),
    ({"enable_jit_checkpoint": True}, {}, "enable_jit_checkpoint=True lets each rank save by itself"),
]


@pytest.mark.parametrize(("more", "kwargs", "message"), REFUSED, ids=["fp16", "optimizers", "optimizer class", "jit"])
def test_refused(
    more: dict[str, Any], kwargs: dict[str, Any], message: str, parts: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RefusedConfiguration, match=message):
        make(RoseTrainer, parts, tmp_path, more, **kwargs)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # also where Trainer had put a handler of its own


def test_dropout_zero_is_refused(parts: dict[str, Any], tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    dry = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    model = AutoModelForSequenceClassification.from_pretrained(parts["where"], num_labels=2, **dry)
    with pytest.raises(RefusedConfiguration, match="every dropout probability"):
        RoseTrainer(model=model, args=args, rose=RoseConfig(strategy="first"))
    RoseTrainer(model=model, args=args, rose=RoseConfig(strategy="second"))


def test_sequences_split_over_ranks_are_refused(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer: Any = make(RoseTrainer, parts, tmp_path, {})
    monkeypatch.setattr(Accelerator, "parallelism_config", SimpleNamespace(cp_size=2))
    with pytest.raises(RefusedConfiguration, match=r"parallelism_config\.cp_size=2 splits sequences"):
        trainer._refuse()


def test_resumed_where_the_run_went_further(parts: dict[str, Any], tmp_path: Path) -> None:
    """In one process: what the method keeps goes back to the checkpoint too."""
    more = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "save_total_limit": 2}
    trainer = make(RoseTrainer, parts, tmp_path, more, rose=RoseConfig(strategy="first", risk_ema=0.9))
    trainer.train()
    first = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    log = [e["rose/tau_first"] for e in trainer.state.log_history if "loss" in e]
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again = [e["rose/tau_first"] for e in trainer.state.log_history if "loss" in e]
    assert again == log
    assert all(torch.equal(p, first[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize("drop_last", [False, True])
def test_rows_are_evaluated_in_their_order(drop_last: bool, parts: dict[str, Any], tmp_path: Path) -> None:
    """All of them, also where training goes by length and leaves an incomplete batch out."""
    more = {"train_sampling_strategy": "group_by_length", "per_device_eval_batch_size": 3}
    trainer = make(RoseTrainer, parts, tmp_path, {**more, "dataloader_drop_last": drop_last})
    rows = parts["train_dataset"].select(range(16))
    assert trainer.predict(rows).label_ids.tolist() == rows["labels"]
    steps = len(trainer.get_train_dataloader())
    assert steps == len(parts["train_dataset"]) // 4 + (not drop_last and len(parts["train_dataset"]) % 4 > 0)
    assert trainer.args.dataloader_drop_last is drop_last
