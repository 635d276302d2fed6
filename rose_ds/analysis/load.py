"""One way to open a finished run: its model, its tokenizer, its data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rose_ds.analysis.probing import new_head
from rose_ds.data import TaskData, TaskSpec, perturb, tokenize
from rose_ds.data.batching import padding_collator
from rose_ds.experiments.loading import load_data, settings_of, thinned
from rose_ds.experiments.metrics import FILE, Metrics, write_whole
from rose_ds.experiments.models import (
    check_length,
    fingerprint,
    label_names,
    label_order,
    load_model,
    load_tokenizer,
)
from rose_ds.experiments.resumable import digest
from rose_ds.experiments.settings import RunSettings
from rose_ds.hardware import default_device

Batch = dict[str, torch.Tensor]


@dataclass
class Opened:
    """A model and its data."""

    name: str
    """The method, where the folder says it, and the folder's own name."""
    settings: RunSettings
    model: nn.Module
    """In evaluation mode."""
    tokenizer: Any
    data: TaskData
    device: torch.device

    def batches(self, split: str, count: int | None = None, batch_size: int = 32) -> list[Batch]:
        """Rows of a split with their labels (the model's ids), evenly spaced, sorted by length, on the device.

        Args:
            split: train, validation, adversarial, or perturbed.
            count: how many rows; None: all.

        Raises:
            ValueError: the data has no such split.
        """
        rows = thinned(self.rows(split), count)
        order = label_order(self.model.config, self.data.spec)
        tokens = tokenize(rows, self.data.spec, self.tokenizer, self.settings.max_length, order)
        tokens = tokens.select(sorted(range(len(tokens)), key=lambda i: len(tokens[i]["input_ids"])))
        collate = padding_collator(self.tokenizer)
        parts = [
            collate([tokens[i] for i in range(start, min(start + batch_size, len(tokens)))])
            for start in range(0, len(tokens), batch_size)
        ]
        return [{name: value.to(self.device) for name, value in part.items()} for part in parts]

    def subject(self, *splits: str) -> dict[str, Any]:
        """What a log that goes on is of: the weights, and the rows of these splits as the model reads them."""
        rows = {split: self.rows(split) for split in splits}
        return {
            "task": self.data.spec.name,
            "weights": fingerprint(self.model),
            "max_length": self.settings.max_length,
            **{split: digest(r[name] for name in ("label", *self.data.spec.fields)) for split, r in rows.items()},
        }

    def rows(self, split: str) -> Any:
        """A split of the task's data. Raises ValueError where there is none."""
        if split == "perturbed" and self.data.validation is not None:
            return perturb(self.data.validation, self.data.spec.fields, seed=self.settings.perturb_seed)
        rows = getattr(self.data, split, None)
        if rows is None:
            raise ValueError(f"{self.data.spec.name} has no rows to call {split!r} here")
        return rows


def open_run(
    folder: str,
    given: Mapping[str, Any],
    *,
    splits: Sequence[str] = ("validation",),
    attention: str | None = None,
    on_device: bool = True,
) -> Opened:
    """A model folder (or a hub id) with its data.

    Args:
        folder: what ``rose-ds train`` wrote, or any sequence classifier with the task's labels.
        given: flags of RunSettings that the user gave; the others are those of the run.
        splits: which of train, validation and adversarial are needed; an adversarial one may be missing.
        attention: transformers' attn_implementation, e.g. eager for second derivatives.
        on_device: whether the model goes to where the batches go; one that is to be sharded stays on the CPU.

    Raises:
        DataError, ModelError, ValueError: see there.
    """
    settings = settings_of(folder, given)
    tokenizer = load_tokenizer(folder)
    check_length(folder, tokenizer, settings.max_length)
    labels = label_names(folder) if settings.own_files else None
    data = load_data(settings, splits, labels)
    model = load_model(folder, data.spec, trained=True, attention=attention).eval()
    device = default_device()
    return Opened(_name(folder), settings, model.to(device) if on_device else model, tokenizer, data, device)


def fresh_classifier(folder: str, seed: int) -> tuple[nn.Module, Any]:
    """A model with a new head of two labels, on the device, and its tokenizer.

    Raises:
        ModelError: it cannot be loaded.
    """
    torch.manual_seed(seed)
    tokenizer, labels = load_tokenizer(folder), label_names(folder)
    if len(labels) != 2:
        labels = ("0", "1")
    model = load_model(folder, TaskSpec("probe", ("sentence",), labels))
    new_head(model, seed)
    return model.to(default_device()), tokenizer


def _name(folder: str) -> str:
    own = Path(folder).name
    if not (Path(folder) / FILE).is_file():
        return own
    method = Metrics.read(Path(folder)).method
    return own if method is None or method in own else f"{own} ({method})"


def splits_for(split: str) -> tuple[str, ...]:
    """What must be read for ``Opened.batches(split)``; the perturbed set is made of the validation set."""
    return ("train",) if split == "train" else ("validation", "adversarial")


def logits_of(model: Callable[..., Any], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The model's answers to a batch, which it is not shown the labels of."""
    logits: torch.Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return logits


@torch.inference_mode()
def loss_and_accuracy(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, float]:
    """Mean cross entropy and accuracy over rows, the model as it is (dropout off in evaluation mode); fp64 sums."""
    found = [loss_and_right(model, batch) for batch in batches]
    count = sum(len(batch["labels"]) for batch in batches)
    return sum(loss for loss, _ in found) / count, sum(right for _, right in found) / count


def loss_and_right(model: Callable[..., Any], batch: Batch) -> tuple[float, int]:
    """Summed cross entropy, and how many answers are right."""
    labels, logits = batch["labels"], logits_of(model, batch).float()
    loss = F.cross_entropy(logits, labels, reduction="sum").double().item()
    return loss, int((logits.argmax(-1) == labels).sum())


def write_result(folder: Path, name: str, result: Mapping[str, Any]) -> Path:
    """Write NAME.json, whole or not at all."""
    return write_whole(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")


def output_folder(models: Sequence[str], output_dir: str | None) -> Path:
    """Where results go: --output_dir, else the folder ``analysis`` in the first model's.

    Raises:
        ValueError: the first model is no folder, and there is no --output_dir.
    """
    if output_dir is not None:
        return Path(output_dir)
    if not Path(models[0]).is_dir():
        raise ValueError(f"{models[0]} is no folder to write to: give --output_dir")
    return Path(models[0]) / "analysis"


def same_data(opened: Sequence[Opened]) -> None:
    """Refuse to draw models of different data into one picture.

    Raises:
        ValueError: names both, and the flags.
    """
    first = opened[0]
    for other in opened[1:]:
        one, two = _where(first.settings), _where(other.settings)
        different = [f"--{name} ({one[name]} and {two[name]})" for name in one if one[name] != two[name]]
        if different:
            raise ValueError(
                f"{first.name} and {other.name} were trained on different data or lengths: say which to use with "
                f"{', '.join(different)}"
            )


def _where(settings: RunSettings) -> dict[str, Any]:
    """All settings but the model; however a path was written."""
    found = {name: value for name, value in asdict(settings).items() if name != "model"}
    paths = ("data", "train_file", "validation_file", "adversarial_file")
    return found | {name: Path(found[name]).resolve() for name in paths if found[name] is not None}
