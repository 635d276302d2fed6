"""A moving average of the weights, sharded as the optimizer holds them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rose_ds.engines.base import Engine


class WeightAverage:
    """fp32 copies of this rank's slices of all trainable parameters, made from what the optimizer updates."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.slices = engine.trainable_slices()
        engine.settle()
        self.values: list[Tensor] = [s.view(s.param).clone() for s in self.slices]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """After an applied step: ``average = decay * average + (1 - decay) * weights``."""
        self.engine.settle()
        if self.values:
            torch._foreach_lerp_(self.values, [s.view(s.param) for s in self.slices], 1 - decay)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Forward passes inside run with the average; the weights come back bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        self.engine.settle()
        for piece, value in zip(self.slices, self.values, strict=True):
            held = piece.view(piece.param)
            kept = held.clone()
            held.copy_(value)
            value.copy_(kept)
        self.engine.publish()
