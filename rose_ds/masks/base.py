"""What a mask policy is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rose_ds.core.select import Rule, Selector


@dataclass(frozen=True)
class MaskPolicy:
    """A selector (or two) x refresh x rule."""

    selectors: tuple[Selector, ...]
    values: tuple[float, float, float, float] = (0.0, 1.0, 1.0, 1.0)
    """Of the mask, for codes 0 to 3: hard for one selector, soft for ROSE's ensemble (Eq. 5)."""
    rule: Rule = "robust"
    """What a 0 does; see ``rose_ds.core.update.UpdateBatch``."""
    refresh: Literal["step", "once"] = "step"
    """``once``: the first mask stays, and is part of every checkpoint."""
    ranks_risk: bool = False
    """Needs a gradient that is ranked alone: of the divergence between two dropout passes, or of the step's halves."""
    ranks_task: bool = False
    """Needs the gradient of the task loss alone, without what an objective adds to it."""
    ranks_momentum: bool = False
    """Needs AdamW's first moment."""
    fisher: bool = False
    """Needs a pass over the training data before the first step (``Stepper.fisher_pass``)."""
    preserve_scale: bool = False
    """Multiply each tensor's mask by elements / (kept + 1), so that the mean step keeps its size."""
