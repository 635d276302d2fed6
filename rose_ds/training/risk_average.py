"""First-order risk over steps: averaged, or found in some steps only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rose_ds.config import RoseConfig
from rose_ds.errors import RefusedConfiguration
from rose_ds.objectives import Objective


class RiskAverage:
    """``risk_t = decay * risk_(t-1) + (1 - decay) * |d L_KL / d theta|``, fp32, for each eligible element of this rank.

    It starts from 0; only the order of risks matters, so the first steps need no bias correction.
    """

    def __init__(self, config: RoseConfig) -> None:
        self.decay, self.every, self.warmup = config.risk_ema, config.risk_every, config.mask_warmup_steps
        self.values: list[Tensor] | None = None
        """By slice, 1-D; None before the first step that ranks."""

    def due(self, steps_taken: int) -> bool:
        """Whether the step after so many is one that finds risk anew."""
        return self.values is None or (steps_taken - self.warmup) % self.every == 0

    def with_new(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """The average with one more step's gradients, which are not changed. It is ``values`` only once kept: a step
        with a gradient that is not finite must leave no trace.
        """
        if self.values is None:
            return [g.abs().float() * (1 - self.decay) for g in grads]
        return [torch.lerp(g.abs().float(), old, self.decay) for g, old in zip(grads, self.values, strict=True)]


def refuse_together(config: RoseConfig, objective: Objective) -> None:
    """Settings of first-order risk and an objective that do not go together.

    Raises:
        RefusedConfiguration: the objective trains on the very divergence that is ranked.
    """
    if objective.trains_on_risk and config.uses_first and (config.first_order != "exact" or config.keeps_risk):
        what = f'first_order="{config.first_order}"' if config.first_order != "exact" else "risk_ema or risk_every"
        raise RefusedConfiguration(
            f"objective {objective.name!r} trains on the divergence whose gradient is first-order risk, so each step "
            f"has both passes and the whole of this gradient already: leave {what} out"
        )
