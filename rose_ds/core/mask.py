"""From risks to masks (Eq. 3 and Eq. 5).

A mask is kept as one byte for each parameter, a *code* with one bit for each ranking (for ROSE, bit 0 is the
first-order and bit 1 the second-order mask); a mask policy says which value of the mask belongs to codes 0 to 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FIRST, SECOND = 1, 2


def keep_count(fraction: float, n: int) -> int:
    """k of Eq. 3: how many of ``n`` risks are kept, at least one. 1e-9 absorbs the rounding of e.g. 0.6 * 5."""
    return max(1, math.floor(fraction * n + 1e-9))


def add_mask_(codes: Tensor, score: Tensor, tau: float | Tensor, bit: int, *, largest: bool = False) -> Tensor:
    """Set ``bit`` of ``codes`` (uint8) where ``score <= tau`` (Eq. 3), or ``>= tau``; ties are kept. In place. ``tau``
    may lie on the scores' device: fp32, of no dimension.
    """
    kept = score >= tau if largest else score <= tau
    return codes.bitwise_or_(kept.to(torch.uint8).mul_(bit).view_as(codes))
