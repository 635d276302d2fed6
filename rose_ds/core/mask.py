"""From risks to masks (Eq. 3 and Eq. 5).

A mask is kept as one byte for each parameter, a *code* whose bit 0 is the first-order and bit 1 the second-order mask;
``mask_values`` gives the mask's value for each code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rose_ds.config import RoseConfig

FIRST, SECOND = 1, 2


def keep_count(fraction: float, n: int) -> int:
    """k of Eq. 3: how many of ``n`` risks are kept, at least one. 1e-9 absorbs the rounding of e.g. 0.6 * 5."""
    return max(1, math.floor(fraction * n + 1e-9))


def add_mask_(codes: Tensor, risk: Tensor, tau: float, bit: int) -> Tensor:
    """Set ``bit`` of ``codes`` (uint8) where ``risk <= tau`` (Eq. 3); every tie at tau is kept. In place."""
    return codes.bitwise_or_((risk <= tau).to(torch.uint8).mul_(bit).view_as(codes))


def mask_values(config: RoseConfig) -> tuple[float, float, float, float]:
    """Value of the mask for codes 0..3: hard for one strategy, the soft ensemble of Eq. 5 for both."""
    if config.strategy == "ensemble":
        return (0.0, config.gamma, 1.0 - config.gamma, 1.0)
    return (0.0, 1.0, 1.0, 1.0)
