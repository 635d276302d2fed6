"""Which of two features that agree in training does a model learn (Section 4.2)?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from rose_ds.analysis.msgs import Probe


@dataclass
class Training:
    """How a model is trained on the ambiguous items."""

    _argument_group_name: ClassVar[str] = "training on ambiguous items"

    train_items: int = field(default=1000, metadata={"help": "So many ambiguous items to train on."})
    test_items: int = field(default=500, metadata={"help": "So many disambiguating items to measure with."})
    epochs: int = field(default=3, metadata={"help": "Passes over the training items."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Of AdamW, with linear decay to 0."})
    train_batch_size: int = field(default=32, metadata={"help": "Items a step."})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "A training run each: head, order, dropout."}
    )

    def __post_init__(self) -> None:
        for name in ("train_items", "test_items", "epochs", "train_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0")


def matthews_correlation(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """Of two binary sequences, which is their Pearson correlation; 0 where one of them is constant."""
    a, b = np.asarray(predicted, dtype=float), np.asarray(labels, dtype=float)
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def linguistic_bias(
    model: nn.Module, tokenizer: Any, train: Sequence[Probe], test: Sequence[Probe], how: Training, seed: int
) -> dict[str, float]:
    """Train ``model``, whose head is new and has two labels, on ambiguous items; measure on the others.

    Returns:
        ``mcc``: correlation of the answers with the linguistic label: 1 all by syntax, -1 all by the surface.
        ``train_accuracy``: on the ambiguous items, without dropout; low: the number before says nothing.
    """
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    steps = how.epochs * -(-len(train) // how.train_batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for _ in range(how.epochs):
        order = rng.permutation(len(train))
        for start in range(0, len(train), how.train_batch_size):
            part = [train[i] for i in order[start : start + how.train_batch_size]]
            batch = tokenizer([p.sentence for p in part], padding=True, return_tensors="pt").to(device)
            labels = torch.tensor([p.linguistic for p in part], device=device)
            F.cross_entropy(model(**batch).logits.float(), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    right = [a == p.linguistic for a, p in zip(_answers(model, tokenizer, train), train, strict=True)]
    found = _answers(model, tokenizer, test)
    return {
        "mcc": matthews_correlation(found, [p.linguistic for p in test]),
        "train_accuracy": float(np.mean(right)),
    }


@torch.inference_mode()
def _answers(model: nn.Module, tokenizer: Any, items: Sequence[Probe]) -> list[int]:
    device, found = next(model.parameters()).device, []
    for start in range(0, len(items), 64):
        texts = [p.sentence for p in items[start : start + 64]]
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt").to(device)).logits
        found += logits.argmax(-1).tolist()
    return found


def new_head(model: nn.Module, seed: int) -> None:
    """Give every parameter of the head new numbers, as transformers initialises them."""
    torch.manual_seed(seed)
    base = set(map(id, model.base_model.parameters()))  # type: ignore[operator,union-attr]
    deviation = getattr(getattr(model, "config", None), "initializer_range", 0.02)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) in base:
                continue
            if p.dim() > 1:
                nn.init.normal_(p, std=deviation)
            elif name == "weight":  # a norm's, which scales: zeros would silence what comes before it
                nn.init.ones_(p)
            else:
                nn.init.zeros_(p)
