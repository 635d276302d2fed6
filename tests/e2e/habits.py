"""A tiny classifier, its data, and a RoseTrainer over both: for what people do with a Trainer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, TrainingArguments

from rose_ds import RoseConfig
from rose_ds.training.trainer import RoseTrainer

TINY: dict[str, Any] = {
    **{"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "intermediate_size": 64,
}
DRY: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FIRST = RoseConfig(strategy="first", keep_first=0.5)


def bert(cls: Any = BertForSequenceClassification, **config: Any) -> Any:
    torch.manual_seed(0)
    return cls(BertConfig(**{**TINY, **config}))


def rows(count: int = 64, length: int = 12) -> list[dict[str, Any]]:
    ids = torch.randint(5, 100, (count, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": r, "attention_mask": torch.ones_like(r), "labels": int(r[0]) % 2} for r in ids]


def numbered(count: int) -> list[dict[str, Any]]:
    """Rows that can be told apart by their tokens."""
    return [{"input_ids": torch.full((4,), i), "labels": i % 2} for i in range(count)]


class Rounds(IterableDataset):  # type: ignore[type-arg]
    """A stream that is over after so many rows."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return iter(rows(self.count))


class Seeing(RoseTrainer):
    """Notes the numbered rows that it trains on, by micro-batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[list[int]] = []

    def training_step(self, model: Any, inputs: Any, *args: Any) -> Tensor:
        self.seen.append(inputs["input_ids"][:, 0].tolist())
        return super().training_step(model, inputs, *args)


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        **{"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
        **{"logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True},
    }
    return TrainingArguments(**{**settings, **more})


def trainer(
    folder: Path, model: Any = None, data: Any = None, *, cls: Any = RoseTrainer, more: Any = None, **kwargs: Any
) -> Any:
    return cls(
        model=bert() if model is None else model,
        args=arguments(folder, **(more or {})),
        train_dataset=rows() if data is None else data,
        **kwargs,
    )


def count_steps(made: Any) -> list[int]:
    """The optimizer steps that a trainer is going to take, one by one."""
    steps: list[int] = []

    class Counting(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.append(state.global_step + 1)

    made.add_callback(Counting())
    return steps


def train(made: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The log's training entries without their times, and the weights afterwards."""
    torch.manual_seed(1)  # dropout
    made.train()
    entries = [{k: v for k, v in e.items() if k != "epoch"} for e in made.state.log_history if "loss" in e]
    return entries, {name: p.detach().clone() for name, p in made.model.named_parameters()}


def assert_same(a: tuple[list[dict[str, float]], dict[str, Tensor]], b: Any) -> None:
    assert a[0] == b[0]
    assert all(torch.equal(p, b[1][name]) for name, p in a[1].items())


def first_line(error: BaseException) -> str:
    """A message up to its first way out, on one line."""
    return re.split(r"(?<=[a-z0-9)]): |; ", " ".join(str(error).split()))[0].replace("|", "\\|")
