"""Masked AdamW (Algorithm 1, lines 8-13)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def masked_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masks: list[Tensor],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step on lists of equally shaped tensors, in place; ``masks`` broadcast, with values in [0, 1].

    Where the mask is 0, exp_avg and the parameter keep their exact bits and exp_avg_sq drifts to exp_avg**2 (line 10).
    ``step`` counts from 1.
    """
    # Line 8: g' = M*g + (1-M)*m. lerp is exact at both ends.
    used = torch._foreach_lerp(exp_avgs, grads, masks)
    # Lines 9 and 10
    torch._foreach_lerp_(exp_avgs, used, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, used, used, 1 - beta2)
    # Lines 11-13: theta -= lr * (m_hat / (sqrt(v_hat) + eps) + wd * theta) * M
    denominator = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominator, math.sqrt(1 - beta2**step))
    torch._foreach_add_(denominator, eps)
    update = torch._foreach_div(exp_avgs, denominator)
    torch._foreach_div_(update, 1 - beta1**step)
    if weight_decay:
        torch._foreach_add_(update, params, alpha=weight_decay)
    torch._foreach_mul_(update, masks)
    torch._foreach_add_(params, update, alpha=-lr)


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    foreach: bool | None,
) -> None:
    """The same with a mask of ones everywhere: torch's own AdamW, in place. ``step`` counts from 1."""
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [torch.tensor(float(step - 1)) for _ in params],  # torch counts them up itself
        foreach=foreach,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
