"""A control: as many parameters as ROSE keeps, at random, each step anew."""

from __future__ import annotations

from torch import Tensor

from rose_ds.config import RoseConfig
from rose_ds.core.magnitudes import Magnitudes
from rose_ds.core.select import Selector
from rose_ds.masks.base import MaskPolicy


def uniform(x: Magnitudes) -> Tensor:
    """Drawn from seed, step, name and position: the same mask on any sharding."""
    return x.uniform


def random_mask(config: RoseConfig) -> MaskPolicy:
    """ROSE's update with a mask that knows nothing."""
    return MaskPolicy((Selector(uniform, config.keep_first, kernel="uniform"),))
