"""GaLLoP (2025): train where the task gradient is large and the pretrained weight small."""

from __future__ import annotations

from torch import Tensor

from rose_ds.config import RoseConfig
from rose_ds.core.magnitudes import Magnitudes
from rose_ds.core.select import Selector
from rose_ds.masks.base import MaskPolicy


def relative_gradient(x: Magnitudes) -> Tensor:
    """|gradient| / |weight|; 0 where there is no gradient."""
    grad = x.grad
    return (grad / x.weight).masked_fill_(grad == 0, 0)


def gallop(config: RoseConfig) -> MaskPolicy:
    """Keep the largest ``keep_first`` of the first step, when weights are still the pretrained ones, for the whole run;
    the mask multiplies the gradient.
    """
    selector = Selector(relative_gradient, config.keep_first, largest=True)
    return MaskPolicy((selector,), rule="gradient", refresh="once", ranks_task=True)
