"""Masked AdamW: ROSE's (Algorithm 1, lines 8-13), and masks that multiply the gradient or the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

_BATCH = 1 << 21  # masked elements updated at a time: bounds the fp32 scratch memory


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
    used = list(torch._foreach_lerp(exp_avgs, grads, masks))
    # Lines 9 to 13: theta -= lr * (m_hat / (sqrt(v_hat) + eps) + wd * theta) * M
    update = _direction(used, exp_avgs, exp_avg_sqs, step, beta1, beta2, eps)
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


def adamw_masked_update_(
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
    """AdamW whose moments and weight decay know no mask; the step itself is multiplied with it. In place."""
    update = _direction(grads, exp_avgs, exp_avg_sqs, step, beta1, beta2, eps)
    torch._foreach_mul_(update, masks)
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(params, update, alpha=-lr / (1 - beta1**step))


def _direction(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
) -> list[Tensor]:
    """Moves the moments, in place; ``m / (sqrt(v_hat) + eps)``, whose m is still to be bias-corrected."""
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    denominator = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominator, math.sqrt(1 - beta2**step))
    torch._foreach_add_(denominator, eps)
    return list(torch._foreach_div(exp_avgs, denominator))


class UpdateBatch:
    """Collects views and updates them together: one foreach call for many tensors, bounded scratch memory.

    Args:
        group: a parameter group's lr, betas, eps, weight_decay and foreach.
        step: of the views' parameters, from 1.
        values: what the mask is where the code is 0, 1, 2, 3.
        rule: what the mask does. ``robust``: Algorithm 1, a 0 freezes the parameter and its momentum. ``gradient``: it
            multiplies the gradient; moments decay and weight decay goes on. ``update``: it multiplies the step alone.
    """

    def __init__(self, group: dict[str, Any], step: int, values: tuple[float, ...], rule: str = "robust") -> None:
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])
        self.scalars = dict(
            step=step, lr=lr, beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"]
        )
        self.foreach, self.values, self.rule = group["foreach"], values, rule
        self.free: list[tuple[Tensor, ...]] = []
        self.masked: list[tuple[Tensor, ...]] = []
        self.pending = 0

    def add(self, code: Tensor | int, views: tuple[Tensor, ...], scale: float = 1.0) -> None:
        """Take a mask code, what it masks (views of a parameter, its gradient, exp_avg and exp_avg_sq), and a factor
        for the mask's values.
        """
        if isinstance(code, Tensor):
            for start in range(0, code.numel(), _BATCH):
                part = slice(start, start + _BATCH)
                self._add_masked(code[part], tuple(v[part] for v in views), scale)
        elif self.values[code] * scale == 1.0:
            self.free.append(views)
        else:
            self._add_masked(torch.tensor([code], dtype=torch.uint8, device=views[0].device), views, scale)

    def _add_masked(self, code: Tensor, views: tuple[Tensor, ...], scale: float) -> None:
        if self.pending + views[0].numel() > _BATCH:
            self._flush_masked()
        table = torch.tensor(self.values, dtype=views[2].dtype, device=code.device).mul_(scale)
        self.masked.append((*views, table[code.int()]))
        self.pending += views[0].numel()

    def _flush_masked(self) -> None:
        if self.masked:
            params, grads, exp_avgs, exp_avg_sqs, masks = (list(column) for column in zip(*self.masked, strict=True))
            if self.rule == "gradient":
                grads = [g * m for g, m in zip(grads, masks, strict=True)]
                adamw_(params, grads, exp_avgs, exp_avg_sqs, foreach=self.foreach, **self.scalars)
            else:
                update = masked_adamw_ if self.rule == "robust" else adamw_masked_update_
                update(params, grads, exp_avgs, exp_avg_sqs, masks, **self.scalars)
        self.masked, self.pending = [], 0

    def flush(self) -> None:
        """Update what was taken."""
        self._flush_masked()
        if self.free:
            params, grads, exp_avgs, exp_avg_sqs = (list(column) for column in zip(*self.free, strict=True))
            adamw_(params, grads, exp_avgs, exp_avg_sqs, foreach=self.foreach, **self.scalars)
            self.free = []
