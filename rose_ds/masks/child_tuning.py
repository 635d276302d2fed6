"""Child-Tuning_D (Xu et al., EMNLP 2021): train the child network of largest Fisher information."""

from __future__ import annotations

from torch import Tensor

from rose_ds.config import RoseConfig
from rose_ds.core.magnitudes import Magnitudes
from rose_ds.core.select import Selector
from rose_ds.masks.base import MaskPolicy


def fisher(x: Magnitudes) -> Tensor:
    """The mean squared gradient, which the Fisher pass leaves in the place of the ranked gradient."""
    return x.risk


def child_tuning(config: RoseConfig) -> MaskPolicy:
    """Keep the largest ``keep_first`` for the whole run; the mask multiplies the clipped gradient."""
    return MaskPolicy(
        (Selector(fisher, config.keep_first, largest=True),), rule="gradient", refresh="once", fisher=True
    )
