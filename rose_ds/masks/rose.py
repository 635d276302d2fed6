"""ROSE (Jiang et al., EMNLP 2022): keep the updates of lowest risk."""

from __future__ import annotations

from torch import Tensor

from rose_ds.config import RoseConfig
from rose_ds.core.magnitudes import Magnitudes
from rose_ds.core.mask import FIRST, SECOND
from rose_ds.core.risk import first_order_risk, second_order_risk
from rose_ds.core.select import Selector
from rose_ds.masks.base import MaskPolicy


def first_order(x: Magnitudes) -> Tensor:
    """Eq. 2."""
    return first_order_risk(x.risk)


def second_order(x: Magnitudes) -> Tensor:
    """Eq. 4; alpha = 1 - beta1 is in ``alpha_grad`` already."""
    return second_order_risk(x.alpha_grad, x.momentum, beta1=0.0)


def rose(config: RoseConfig) -> MaskPolicy:
    """ROSE-First, -Second or -Ensemble (Eq. 3 and 5); ``keep_largest`` turns the ranking round, as a control."""
    first, second = config.uses_first, config.uses_second
    selectors = []
    if first:
        keep, largest = config.keep_first, config.keep_largest
        selectors.append(Selector(first_order, keep, largest, FIRST, ranks_risk=True, kernel="first"))
    if second:
        keep, largest = config.keep_second, config.keep_largest
        selectors.append(Selector(second_order, keep, largest, SECOND, kernel="second"))
    return MaskPolicy(
        tuple(selectors),
        values=(0.0, config.gamma, 1.0 - config.gamma, 1.0) if first and second else (0.0, 1.0, 1.0, 1.0),
        ranks_risk=first,
        ranks_task=second,
        ranks_momentum=second,
    )
