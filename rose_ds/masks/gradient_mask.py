"""Gradient-Mask Tuning (Li et al., 2024): keep the largest task gradients."""

from __future__ import annotations

from torch import Tensor

from rose_ds.config import RoseConfig
from rose_ds.core.magnitudes import Magnitudes
from rose_ds.core.select import Selector
from rose_ds.masks.base import MaskPolicy


def magnitude(x: Magnitudes) -> Tensor:
    """|task gradient|."""
    return x.grad


def gradient_mask(config: RoseConfig) -> MaskPolicy:
    """Keep the largest ``keep_first``, each step anew; the mask multiplies the gradient."""
    selector = Selector(magnitude, config.keep_first, largest=True, kernel="gradient")
    return MaskPolicy((selector,), rule="gradient", ranks_task=True)
