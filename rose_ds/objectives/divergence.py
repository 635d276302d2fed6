"""Divergence between two predictions of one batch (Eq. 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def symmetric_kl(logits_a: Tensor, logits_b: Tensor) -> Tensor:
    """Eq. 1: ``KL(P_a || P_b) + KL(P_b || P_a)``, mean over the batch, in fp32.

    Args:
        logits_a, logits_b: shape (..., classes), the same; leading dimensions are all batch.

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
    a = torch.log_softmax(logits_a.float().reshape(-1, classes), -1)
    b = torch.log_softmax(logits_b.float().reshape(-1, classes), -1)
    return F.kl_div(a, b, log_target=True, reduction="batchmean") + F.kl_div(
        b, a, log_target=True, reduction="batchmean"
    )
