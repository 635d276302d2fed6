"""How risky an update of each parameter is (Eq. 2 and Eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rose_ds.kernels import fits


def first_order_risk(kl_grad: Tensor) -> Tensor:
    """Eq. 2 for scalar parameters: ``|d L_KL / d theta_i|``, fp32, same shape."""
    return kl_grad.abs().float()


def second_order_risk(grad: Tensor, exp_avg: Tensor, beta1: float) -> Tensor:
    """Eq. 4: ``| (1 - beta1) * ||g|| / ||m|| - 1 |``, fp32, same shape.

    Args:
        grad: task gradient after unscaling and clipping (exp_avg holds clipped gradients too), or its norms.
        exp_avg: AdamW's first moment before this step, or its norms.
        beta1: the decay of the parameter's group.

    Where exp_avg is 0 there is no history and Eq. 4 is x/0. The risk is 0 there (kept): a frozen parameter would have
    g' = m = 0 and could never leave that state.
    """
    magnitude = exp_avg.abs().float()
    risk = grad.abs().float().mul_(1 - beta1).div_(magnitude).sub_(1).abs_()
    return risk.masked_fill_(magnitude == 0, 0)


_CHUNK = 1 << 20  # values converted to fp64 at a time: torch makes a copy


def squared_norms(
    slices: Sequence[Tensor],
    index: Sequence[int],
    count: int,
    scales: Sequence[float] | None = None,
    kernels: Any | None = None,
) -> Tensor:
    """Sums of squares in fp64, shape (count,): slice ``i``, times ``scales[i]``, is part of tensor ``index[i]``.

    fp64, so that the sum over shards depends on the sharding by less than an fp32 rounding; by torch and by ``kernels``
    it differs as little.
    """
    device = slices[0].device if slices else torch.device("cpu")
    sums = torch.zeros(count, dtype=torch.float64, device=device)
    if slices:
        if kernels is not None and hasattr(kernels, "squares") and all(fits(s, half=True) for s in slices):
            squares: Tensor = kernels.squares(list(slices))
        else:
            squares = torch.stack([_squared(s) for s in slices])
        if scales is not None:
            squares *= torch.tensor(list(scales), dtype=torch.float64, device=device).square()
        if count == 1:  # no index, which the host would copy to the device and wait for
            return squares.sum().view(1)
        sums.index_add_(0, torch.tensor(list(index), device=device), squares)
    return sums


def _squared(values: Tensor) -> Tensor:
    """Sum of squares, computed in fp64."""
    parts = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in values.reshape(-1).split(_CHUNK)]
    return parts[0].square() if len(parts) == 1 else torch.stack(parts).square().sum()
