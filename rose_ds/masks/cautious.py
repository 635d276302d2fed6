"""Cautious AdamW (Liang et al., 2024): step only where the update and the gradient have one sign."""

from __future__ import annotations

import torch
from torch import Tensor

from rose_ds.config import RoseConfig
from rose_ds.core.magnitudes import ElementMagnitudes
from rose_ds.core.select import Selector
from rose_ds.masks.base import MaskPolicy


def agreement(x: ElementMagnitudes) -> Tensor:
    """1 where the momentum after the step and the gradient have one sign; 0 where not, or where either is 0; or NaN."""
    product = x.next_momentum.mul_(x.signed_grad)
    return torch.where(product.isnan(), product, (product > 0).float())


def cautious(config: RoseConfig) -> MaskPolicy:
    """No threshold to look for: where signs agree, the step is taken, scaled up by the share of those that do not."""
    selector = Selector(agreement, keep=1.0, largest=True, fixed=1.0, kernel="agreement")
    return MaskPolicy((selector,), rule="update", ranks_momentum=True, preserve_scale=True)
