"""A trained classifier as the attacks see it: texts in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rose_ds.data.tasks import TaskSpec, get_task
from rose_ds.experiments.loading import settings_of
from rose_ds.experiments.metrics import FILE as METRICS
from rose_ds.experiments.models import (
    check_length,
    fingerprint,
    label_names,
    label_order,
    load_model,
    load_tokenizer,
)
from rose_ds.experiments.settings import RunSettings
from rose_ds.hardware import default_device

Texts = tuple[str, ...]


class Classifier:
    """``predict`` is all that an attack needs, and all that another library's wrapper has to call.

    Args:
        model: a folder that ``rose-ds train`` wrote, or any sequence classifier with the task's labels.
        spec: the task. Default: that of the model's run; for a model without one, or of one's own files, its labels as
            it has them.
        max_length: longer texts are cut to so many tokens. Default: as in the model's run, or 128.
        batch_size: texts that the model is given at a time.
        device: default: the accelerator, if there is one.

    Raises:
        ValueError: ``batch_size`` < 1 or ``max_length`` < 8; the model's metrics.json cannot be read.
        ModelError: it cannot be loaded, or has other labels.
    """

    def __init__(
        self,
        model: str,
        spec: TaskSpec | None = None,
        *,
        max_length: int | None = None,
        batch_size: int = 64,
        device: str | None = None,
    ) -> None:
        if max_length is None:
            trained_here = (Path(model) / METRICS).is_file()
            max_length = settings_of(model, {}).max_length if trained_here else RunSettings.max_length
        for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 8)):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        spec = _task_of(model) if spec is None else spec
        self.tokenizer = load_tokenizer(model)
        check_length(model, self.tokenizer, max_length)
        self.model = load_model(model, spec, trained=True).eval()
        self.device = default_device() if device is None else torch.device(device)
        self.model.to(self.device)
        self.order = label_order(self.model.config, spec)
        self.max_length, self.batch_size = max_length, batch_size

    @property
    def fingerprint(self) -> str:
        """See ``rose_ds.experiments.models.fingerprint``."""
        return fingerprint(self.model)

    @torch.inference_mode()
    def predict(self, texts: Sequence[Texts] | Sequence[str]) -> np.ndarray:
        """Logits (texts, classes), fp32, in the order of the task's labels. The model reads texts once that have the
        same tokens, such as those of a search that differ only beyond ``max_length``.

        Args:
            texts: strings, or a tuple of one or two strings each, all of one kind.
        """
        rows = [(text,) if isinstance(text, str) else tuple(text) for text in texts]
        found = np.zeros((len(rows), len(self.order)), dtype=np.float32)
        if not rows:
            return found
        columns = [list(column) for column in zip(*rows, strict=True)]
        tokens = self.tokenizer(*columns, truncation=True, max_length=self.max_length)
        # an empty text, where the tokenizer puts nothing around it, is one token of padding that is attended to
        blank = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 1}
        filled = {name: [row or [blank.get(name, 0)] for row in column] for name, column in tokens.items()}
        alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for i, row in enumerate(zip(*filled.values(), strict=True)):
            alike.setdefault(tuple(map(tuple, row)), []).append(i)
        by_length = sorted(alike, key=lambda row: len(row[0]))  # little padding in a batch
        for start in range(0, len(by_length), self.batch_size):
            part = by_length[start : start + self.batch_size]
            batch = self.tokenizer.pad(
                {name: [list(row[i]) for row in part] for i, name in enumerate(filled)}, return_tensors="pt"
            )
            logits = self.model(**batch.to(self.device)).logits.float().cpu().numpy()[:, self.order]
            for row, values in zip(part, logits, strict=True):
                found[alike[row]] = values
        return found


def _task_of(model: str) -> TaskSpec:
    """The task of a model's run, or one with its labels; how many texts it reads is left open."""
    if (Path(model) / METRICS).is_file():
        run = settings_of(model, {})
        if not run.own_files:
            return get_task(run.task)
    return TaskSpec(Path(model).name, (), label_names(model))
