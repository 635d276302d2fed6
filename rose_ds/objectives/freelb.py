"""FreeLB (Zhu et al., ICLR 2020): the task loss at several points of an ascent in the embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from rose_ds.objectives import base
from rose_ds.objectives.base import MicroBatch, Objective, check_count, check_number, constant
from rose_ds.objectives.divergence import dropout_risk


@dataclass(frozen=True)
class FreeLB(Objective):
    """``L = mean over k of CE(x + d_k)``, each pass's gradient also moving d: ``d += step_size * g / ||g||``, per row.

    All passes of a micro-batch have one dropout mask. d_0 is uniform, scaled by ``init_mag / sqrt(tokens * dim)``, zero
    on padding; after each step d is projected onto the L2 ball of radius ``max_norm`` of its row (0: not).
    """

    name: ClassVar[str] = "freelb"
    passes: int = constant(3, "FreeLB's forward and backward passes for each micro-batch.")
    step_size: float = constant(1e-1, "Size of FreeLB's ascent steps.")
    init_mag: float = constant(2e-1, "Magnitude of the noise that FreeLB's perturbation starts from.")
    max_norm: float = constant(2e-1, "Radius of the L2 ball that holds a row's perturbation; 0: no ball.")

    def __post_init__(self) -> None:
        check_count("passes", self.passes)
        for name in ("step_size", "init_mag", "max_norm"):
            check_number(name, getattr(self, name))

    @property
    def shifts(self) -> bool:
        return True

    @property
    def compares(self) -> bool:
        return False

    def __call__(self, batch: MicroBatch) -> Tensor:
        dropout_risk(batch)
        shift: Any = self._noise
        first, total = None, torch.zeros(())
        for k in range(self.passes):
            last = k == self.passes - 1
            p = batch.run(shift, like=first)
            first = first or p
            value = batch.loss(p) / self.passes
            batch.backward(value, p, more=not last)
            total = total.to(value.device) + value.detach()
            if not last:
                shift = self._ascend(p.shift.detach(), p.shift.grad)
        return total

    def _ascend(self, shift: Tensor, gradient: Tensor) -> Tensor:
        """One step, row by row; a row whose gradient is zero or not finite stays where it is."""
        rows = (-1, *(1,) * (shift.dim() - 1))
        # scaled by its largest element first: squares of a gradient of 1e-25 are zero in fp32
        largest = gradient.abs().flatten(1).amax(1)
        usable = (largest > 0) & torch.isfinite(largest)
        direction = gradient / torch.where(usable, largest, 1.0).view(rows)
        norm = direction.flatten(1).norm(dim=1).clamp_min(1e-8)
        step = torch.where(usable.view(rows), direction / norm.view(rows), 0.0)
        moved = shift + self.step_size * step
        if not self.max_norm:
            return moved
        length = moved.flatten(1).norm(dim=1)
        return moved * torch.where(length > self.max_norm, self.max_norm / length, 1.0).view(rows)

    def _noise(self, real: Tensor, shape: tuple[int, ...], generator: Generator) -> Tensor:
        uniform = base.uniform_noise(shape, generator) * 2 - 1
        size = self.init_mag / (real.sum(1).clamp_min(1) * shape[-1]).sqrt()
        return uniform * real[..., None] * size[:, None, None]
