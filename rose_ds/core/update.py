"""Masked AdamW: ROSE's (Algorithm 1, lines 8-13), and masks that multiply the gradient or the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.adamw import adamw

from rose_ds.core.device import numbers
from rose_ds.core.mask import BitMask
from rose_ds.kernels import fits

_BATCH = 1 << 20  # masked elements updated at a time: bounds the scratch memory
_FUSED_ON = ("cuda", "xpu", "mps")
_NO_CODES = torch.empty(0, dtype=torch.uint8)  # of a piece that has one code


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

    Where the mask is 1 this is torch's fused AdamW to the last bit. Where it is 0, exp_avg and the parameter keep their
    bits, whatever the gradient is, and exp_avg_sq drifts to exp_avg**2 (line 10). ``step`` counts from 1.
    """
    frozen = [mask == 0 for mask in masks]
    # Line 8: g' = M*g + (1-M)*m. At both ends chosen, not computed: 0 * inf is NaN, and -0.0 + 0.0 loses its sign.
    used = list(torch._foreach_lerp(exp_avgs, grads, masks))
    used = [torch.where(mask == 1, g, u) for mask, g, u in zip(masks, grads, used, strict=True)]
    used = _where(frozen, exp_avgs, used)
    # Lines 9 and 10
    moved = torch._foreach_lerp(exp_avgs, used, 1 - beta1)
    torch._foreach_copy_(exp_avgs, _where(frozen, exp_avgs, list(moved)))
    denominator = _denominator(used, exp_avg_sqs, step, beta2, eps)
    # Lines 11 to 13: theta -= lr * (m_hat / (sqrt(v_hat) + eps) + wd * theta) * M
    change = _masked_step(masks, exp_avgs, denominator, lr / (1 - beta1**step))
    if weight_decay:
        # 1 - M * lr * wd, rounded so that it is torch's 1 - lr * wd where M is 1
        less = [_as_stored(1 - lr * weight_decay, p) - 1 for p in params]
        decayed = [p * mask.mul(by).add_(1) for p, mask, by in zip(params, masks, less, strict=True)]
        torch._foreach_add_(change, decayed)
    else:
        torch._foreach_add_(change, params)
    torch._foreach_copy_(params, _where(frozen, params, change))


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
    foreach: bool | None = None,
    fused: bool | None = None,
) -> None:
    """The same with a mask of ones everywhere: torch's own AdamW, in place. ``step`` counts from 1.

    With neither ``foreach`` nor ``fused``, accelerators take the fused kernel, which needs no memory of its own, and
    CPUs torch's loop over tensors: the fused kernel for CPUs rounds an element by its place in memory, so that a run
    would depend on the number of ranks. (The compiled kernels do not; ``UpdateBatch`` takes them first.)
    """
    scalars: dict[str, Any] = dict(
        beta1=beta1, beta2=beta2, lr=lr, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False
    )
    if fused or (fused is None and foreach is None and params[0].device.type in _FUSED_ON):
        # torch.optim.adamw.adamw(fused=True) counts steps up, one tensor a parameter; the kernel only reads them
        count = torch.full((), float(step), device=params[0].device)
        torch._fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, [], [count] * len(params), **scalars)
        return
    counts = [torch.tensor(float(step - 1)) for _ in params]
    adamw(params, grads, exp_avgs, exp_avg_sqs, [], counts, foreach=foreach, fused=False, **scalars)


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
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    denominator = _denominator(grads, exp_avg_sqs, step, beta2, eps)
    change = _masked_step(masks, exp_avgs, denominator, lr / (1 - beta1**step))
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(params, change)


def _masked_step(masks: list[Tensor], exp_avgs: list[Tensor], denominator: list[Tensor], size: float) -> list[Tensor]:
    """-M * size * m / (sqrt(v_hat) + eps), by the order of operations that the kernels have too."""
    change = [c * m for c, m in zip(torch._foreach_mul(masks, -size), exp_avgs, strict=True)]
    torch._foreach_div_(change, denominator)
    return change


def _denominator(grads: list[Tensor], exp_avg_sqs: list[Tensor], step: int, beta2: float, eps: float) -> list[Tensor]:
    """Moves the second moments, in place; sqrt(v_hat) + eps."""
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    denominator = [_sqrt(v) for v in exp_avg_sqs]
    torch._foreach_div_(denominator, math.sqrt(1 - beta2**step))
    torch._foreach_add_(denominator, eps)
    return denominator


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded: on CPUs torch's fp32 square root is MKL's, which is 1 ulp off in one of six values."""
    if x.dtype == torch.float32 and x.device.type == "cpu":
        return x.double().sqrt_().float()
    return x.sqrt()


def _where(condition: list[Tensor], one: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    return [torch.where(*three) for three in zip(condition, one, other, strict=True)]


def _as_stored(value: float, like: Tensor) -> float:
    """What ``value`` becomes in a tensor of the type of ``like``."""
    return float(torch.tensor(value, dtype=like.dtype))


class UpdateBatch:
    """Collects views and updates them together: one foreach call for many tensors, bounded scratch memory.

    Args:
        group: a parameter group's lr, betas, eps, weight_decay, foreach and fused.
        step: of the views' parameters, from 1.
        values: what the mask is where the code is 0, 1, 2, 3.
        rule: what the mask does. ``robust``: Algorithm 1, a 0 freezes the parameter and its momentum. ``gradient``: it
            multiplies the gradient; moments decay and weight decay goes on. ``update``: it multiplies the step alone.
        kernels: compiled ones (``rose_ds.kernels``), which take what fits them: the bits of ``masked_adamw_``, also
            where the mask is 1 everywhere, unless the group says of foreach or fused whether it wants torch's.
    """

    def __init__(
        self,
        group: dict[str, Any],
        step: int,
        values: tuple[float, ...],
        rule: str = "robust",
        kernels: Any | None = None,
    ) -> None:
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])
        self.scalars = dict(
            step=step, lr=lr, beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"]
        )
        self.kernel = {"foreach": group["foreach"], "fused": group["fused"]}
        self.torchs = any(choice is not None for choice in self.kernel.values())
        self.values, self.rule, self.kernels = values, rule, kernels
        self.fits = getattr(kernels, "fits", fits)  # of the C++ kernels, where they do not say
        self.compiled: list[tuple[Any, ...]] = []
        self.free: list[tuple[Tensor, ...]] = []
        self.masked: list[tuple[Tensor, ...]] = []
        self.tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.pending = 0

    def add(self, code: Tensor | BitMask | int, views: tuple[Tensor, ...], scale: float = 1.0) -> None:
        """Take a mask code, what it masks (views of a parameter, its gradient, exp_avg and exp_avg_sq), and a factor
        for the mask's values.
        """
        whole = isinstance(code, int) and self.values[code] * scale == 1.0
        ours = self.kernels is not None and not (whole and self.torchs)
        if ours and all(self.fits(v, half=i == 1) for i, v in enumerate(views)):
            mask = (code, 0) if isinstance(code, Tensor) else (_NO_CODES, code)
            if isinstance(code, BitMask):
                mask = (code.words, int.from_bytes(code.bits, "little"))
            self.compiled.append((*views, *mask, scale))
            return
        if whole and views[1].dtype == views[0].dtype:
            self.free.append(views)
            return
        if isinstance(code, BitMask):
            code = code.codes()
        if isinstance(code, Tensor) or views[0].dim() == 0:
            views = tuple(v.view(-1) for v in views)
        if not isinstance(code, Tensor):
            code = torch.full((1,), code, dtype=torch.uint8, device=views[0].device)
        # a part at a time: its mask and what is computed on the way, and a gradient of lower precision in full
        flat = [v.view(-1) for v in views] if views[0].numel() > _BATCH or whole else views
        for start in range(0, max(1, views[0].numel()), _BATCH):
            part = slice(start, start + _BATCH)
            pieces = tuple(v[part] for v in flat) if flat is not views else views
            self._add_masked(code[part] if code.numel() > 1 else code, pieces, scale)

    def _add_masked(self, code: Tensor, views: tuple[Tensor, ...], scale: float) -> None:
        if self.pending + views[0].numel() > _BATCH:
            self._flush_masked()
        param, grad, exp_avg, exp_avg_sq = views
        table = self._table(code.device, exp_avg.dtype)
        if scale != 1.0:
            table = table * scale
        self.masked.append((param, grad.to(param.dtype), exp_avg, exp_avg_sq, table[code.int()]))
        self.pending += views[0].numel()

    def _table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The mask's values, made once."""
        if (device, dtype) not in self.tables:
            self.tables[device, dtype] = numbers(self.values, device, dtype)
        return self.tables[device, dtype]

    def _flush_masked(self) -> None:
        if self.masked:
            params, grads, exp_avgs, exp_avg_sqs, masks = (list(column) for column in zip(*self.masked, strict=True))
            if self.rule == "gradient":
                grads = [g * m for g, m in zip(grads, masks, strict=True)]
                adamw_(params, grads, exp_avgs, exp_avg_sqs, **self.kernel, **self.scalars)
            else:
                update = masked_adamw_ if self.rule == "robust" else adamw_masked_update_
                update(params, grads, exp_avgs, exp_avg_sqs, masks, **self.scalars)
        self.masked, self.pending = [], 0

    def flush(self) -> None:
        """Update what was taken."""
        if self.compiled:
            columns = [list(column) for column in zip(*self.compiled, strict=True)]
            x = self.scalars
            numbers = (x["step"], x["lr"], x["beta1"], x["beta2"], x["eps"], x["weight_decay"])
            self.kernels.adamw(*columns, list(self.values), *numbers, self.rule)  # type: ignore[union-attr]
            # of what was written by address, so that a backward pass through the old weights is refused
            increment_version([tensor for column in (columns[0], *columns[2:4]) for tensor in column])
            self.compiled = []
        self._flush_masked()
        together: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, ...]]] = {}
        for views in self.free:  # torch's kernels take tensors of one device and type
            together.setdefault((views[0].device, views[0].dtype), []).append(views)
        for alike in together.values():
            params, grads, exp_avgs, exp_avg_sqs = (list(column) for column in zip(*alike, strict=True))
            adamw_(params, grads, exp_avgs, exp_avg_sqs, **self.kernel, **self.scalars)
        self.free = []
