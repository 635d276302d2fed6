"""Divergence between two predictions of one batch (Eq. 1), and first-order risk made of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rose_ds.objectives.base import MicroBatch


def symmetric_kl(logits_a: Tensor, logits_b: Tensor, *, reduction: str = "mean") -> Tensor:
    """Eq. 1: ``KL(P_a || P_b) + KL(P_b || P_a)``, in fp32, mean over the batch (or its sum).

    Args:
        logits_a, logits_b: shape (..., classes), the same; leading dimensions are all batch.
        reduction: ``mean`` or ``sum`` over the batch.

    Returns:
        Scalar tensor in nats, with a graph to both inputs.

    Raises:
        ValueError: shapes differ, or there are fewer than two classes (a softmax over one class is constant).
    """
    if logits_a.shape != logits_b.shape or logits_a.dim() == 0:
        raise ValueError(f"logits of two passes must have one shape, got {logits_a.shape=} and {logits_b.shape=}")
    classes = logits_a.shape[-1]
    if classes < 2:
        raise ValueError(f"logits have {classes} class(es): the KL between two passes needs at least 2 (regression?)")
    how = {"mean": "batchmean", "sum": "sum"}[reduction]
    a = torch.log_softmax(logits_a.float().reshape(-1, classes), -1)
    b = torch.log_softmax(logits_b.float().reshape(-1, classes), -1)
    return F.kl_div(a, b, log_target=True, reduction=how) + F.kl_div(b, a, log_target=True, reduction=how)


def dropout_risk(batch: MicroBatch, a: Any = None) -> None:
    """First-order risk for objectives without two dropout passes of their own: of ``a`` and another, or of two more."""
    if batch.wants_risk:
        a = a or batch.run()
        b = batch.run()
        batch.risk(symmetric_kl(a.logits, b.logits), a, b)
