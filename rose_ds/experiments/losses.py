"""A loss that weighs classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def weights_of(given: Sequence[str], labels: Sequence[int], names: Sequence[str]) -> list[float]:
    """Weights by label id, scaled to a mean of 1 over the training rows, so that the learning rate means what it means
    without them.

    Args:
        given: a number a class, or "balanced": inverse to the classes' counts.
        labels: of the training rows.

    Raises:
        ValueError: they are not one positive number a class, or a class to be balanced has no row.
    """
    counts = np.bincount(labels, minlength=len(names))
    if list(given) == ["balanced"]:
        empty = [name for name, count in zip(names, counts, strict=True) if not count]
        if empty:
            raise ValueError(f"class_weights=balanced: no training row has the label {', '.join(map(repr, empty))}")
        weights = 1 / counts
    else:
        weights = np.array([_number(text) for text in given])
        if len(weights) != len(names):
            raise ValueError(
                f"class_weights has {len(weights)} numbers, but the labels are {', '.join(map(repr, names))}: give one "
                "each in this order, or balanced"
            )
    return list(map(float, weights * counts.sum() / (weights * counts).sum()))


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"class_weights: {text!r} is neither a positive number nor balanced")
    return value


def weighted_loss(
    weights: Sequence[float], order: Sequence[int], label_smoothing: float = 0.0
) -> Callable[..., Tensor]:
    """Trainer's ``compute_loss_func``: the sum of weighted cross entropies over the rows of the whole batch, so that
    neither accumulation steps nor ranks change what a row weighs.

    Args:
        weights: of the task's labels.
        order: the model's id of each of them.
    """
    by_id = [weight for _, weight in sorted(zip(order, weights, strict=True))]

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs["logits"].float()
        each = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
        weighted = (each * torch.tensor(by_id, device=logits.device)[labels]).sum()
        return weighted / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss
