"""The task loss alone: AdamW, ROSE and the masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rose_ds.objectives.base import MicroBatch, Objective
from rose_ds.objectives.divergence import dropout_risk


@dataclass(frozen=True)
class Task(Objective):
    """``L = CE(a)``; ROSE ranks the KL gradient between a and a second pass (Algorithm 1, lines 1 to 4)."""

    name: ClassVar[str] = "task"

    @property
    def compares(self) -> bool:
        return False

    def __call__(self, batch: MicroBatch) -> Tensor:
        a = batch.run()
        value = batch.loss(a)
        dropout_risk(batch, a)
        batch.backward(value, a)
        return value.detach()
