"""A trained classifier as the attacks see it: texts in, logits out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rose_ds.data.tasks import TaskSpec
from rose_ds.experiments.models import (
    check_length,
    fingerprint,
    label_order,
    load_model,
    load_tokenizer,
)
from rose_ds.hardware import default_device

Texts = tuple[str, ...]


class Classifier:
    """``predict`` is all that an attack needs, and all that another library's wrapper has to call.

    Args:
        model: a folder that ``rose-ds train`` wrote, or any sequence classifier with the task's labels.
        device: default: the accelerator, if there is one.

    Raises:
        ModelError: it cannot be loaded, or has other labels.
    """

    def __init__(
        self, model: str, spec: TaskSpec, *, max_length: int = 128, batch_size: int = 64, device: str | None = None
    ) -> None:
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
        """Logits (texts, classes), fp32, in the order of the task's labels.

        Args:
            texts: strings, or a tuple of one or two strings each.
        """
        rows = [(text,) if isinstance(text, str) else tuple(text) for text in texts]
        found = np.zeros((len(rows), len(self.order)), dtype=np.float32)
        by_length = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))  # little padding in a batch
        for start in range(0, len(rows), self.batch_size):
            part = by_length[start : start + self.batch_size]
            columns = [list(column) for column in zip(*(rows[i] for i in part), strict=True)]
            batch = self.tokenizer(
                *columns, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
            )
            if not batch["input_ids"].shape[1]:  # all are empty, and the tokenizer puts nothing around a text
                blank = {"input_ids": [[self.tokenizer.pad_token_id]] * len(part), "attention_mask": [[1]] * len(part)}
                batch = self.tokenizer.pad(blank, return_tensors="pt")
            logits = self.model(**batch.to(self.device)).logits
            found[part] = logits.float().cpu().numpy()[:, self.order]
        return found
