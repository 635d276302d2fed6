"""SMART (Jiang et al., ACL 2020): smoothness in a ball round the embeddings, and Bregman proximal steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from rose_ds.objectives import base
from rose_ds.objectives.base import MicroBatch, Objective, check_count, check_number, constant
from rose_ds.objectives.divergence import dropout_risk


@dataclass(frozen=True)
class Smart(Objective):
    """``L = CE(x) + weight * KL_sym(f(x), f(x + d)) + proximal * KL_sym(f(x), f_average(x))``.

    In the smoothness term each of the two divergences moves one prediction towards the other, which stands still, as in
    the authors' code. d starts as normal noise, takes ``steps`` ascent steps on the *summed* KL(f(x + d) || f(x)), and
    is scaled to L-infinity norm ``radius`` at each token, as there. Where the ascent's gradient is not finite on any
    rank, all ranks leave the regulariser out of that micro-batch.
    """

    name: ClassVar[str] = "smart"
    weight: float = constant(1.0, "Weight of SMART's smoothness term.")
    steps: int = constant(1, "Ascent steps that find SMART's perturbation.")
    step_size: float = constant(1e-3, "Size of SMART's ascent steps.")
    init_std: float = constant(1e-5, "Standard deviation of the noise that SMART's perturbation starts from.")
    radius: float = constant(1.0, "L-infinity norm of SMART's perturbation at each token.")
    proximal: float = constant(0.0, "Weight of SMART's Bregman proximal term; 0: none (no average of the weights).")
    decay: float = constant(0.999, "Decay of the average of the weights for the proximal term.")
    early_decay: float = constant(0.99, "That decay during the first early_steps.")
    early_steps: int = constant(0, "Optimizer steps with early_decay; SMART's paper: a tenth of all steps.")

    def __post_init__(self) -> None:
        for name in ("weight", "step_size", "init_std", "proximal"):
            check_number(name, getattr(self, name))
        check_number("radius", self.radius, above_zero=True)
        check_count("steps", self.steps)
        check_count("early_steps", self.early_steps, low=0)
        for name in ("decay", "early_decay"):
            check_number(name, getattr(self, name))
            if getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be in [0, 1)")

    @property
    def shifts(self) -> bool:
        return True

    def average_decay(self, step: int) -> float | None:
        if not self.proximal:
            return None
        return self.early_decay if step <= self.early_steps else self.decay

    def __call__(self, batch: MicroBatch) -> Tensor:
        average = batch.average_logits() if self.proximal else None
        clean = batch.run()
        value = batch.loss(clean)
        dropout_risk(batch, clean)
        if average is not None:
            value = value + self.proximal * batch.symmetric_kl(clean.logits, average)
        shift = self._ascend(batch, clean.logits.detach())
        if shift is None:
            batch.backward(value, clean)
        else:
            adversarial = batch.run(shift)
            value = value + self.weight * batch.symmetric_kl(clean.logits, adversarial.logits, fixed_targets=True)
            batch.backward(value, clean, adversarial)
        return value.detach()

    def _ascend(self, batch: MicroBatch, clean: Tensor) -> Tensor | None:
        shift: Tensor | None = None
        for _ in range(self.steps):
            start, uphill = batch.probe(self._noise if shift is None else shift, lambda z: batch.summed_kl(z, clean))
            if not batch.agree(bool(torch.isfinite(uphill).all())):
                return None
            shift = start + self.step_size * uphill
            shift = self.radius * shift / (shift.abs().amax(-1, keepdim=True) + 1e-6)
        return shift

    def _noise(self, real: Tensor, shape: tuple[int, ...], generator: Generator) -> Tensor:
        return self.init_std * base.normal_noise(shape, generator)
