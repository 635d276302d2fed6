"""What scores are made of: magnitudes of gradients, momentum and weights, by element or by tensor.

A score (``rose_ds.masks``) is one function of these; it does not know which of the two granularities it is given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from rose_ds.core.layout import Layout
from rose_ds.core.risk import squared_norms


@dataclass(frozen=True)
class StepInputs:
    """What lies on this rank before an update: lists aligned with the layout's slices, of 1-D tensors."""

    layout: Layout
    grads: Sequence[Tensor]
    """The gradient that updates the weights, any floating type."""
    exp_avgs: Sequence[Tensor]
    """AdamW's first moment before the step."""
    weights: Sequence[Tensor]
    beta1s: Sequence[float]
    scale: Tensor | float = 1.0
    """What ``grads`` are still to be multiplied with (unscaling and clipping)."""
    risk_grads: Sequence[Tensor] | None = None
    """The gradient that is only ranked: of the divergence between two dropout passes, or the difference between the
    halves of a step. fp32, unscaled."""
    share: float = 0.0
    """How much of ``risk_grads`` the objective has put into ``grads``, before clipping."""
    clip: float = 1.0
    """The factor by which clipping shrinks the whole gradient."""
    step: int = 1
    seed: int = 0

    def grad(self, i: int, at: slice) -> Tensor:
        """The task gradient, unscaled and clipped, fp32: what an objective has added by ``share`` is taken out."""
        grad = self.grads[i][at].float().mul(self.scale)
        if self.share and self.risk_grads is not None:
            grad = grad.sub_(self.risk_grads[i][at].float().mul(self.share * self.clip))
        return grad


class Magnitudes(Protocol):
    """Non-negative fp32 tensors of one shape: a part of a slice, or one value for each eligible tensor (its norm)."""

    @property
    def risk(self) -> Tensor:
        """|gradient that is only ranked|."""

    @property
    def grad(self) -> Tensor:
        """|task gradient|, after clipping."""

    @property
    def alpha_grad(self) -> Tensor:
        """(1 - beta1) * |task gradient|, with each parameter group's beta1."""

    @property
    def momentum(self) -> Tensor:
        """|exp_avg| before the step."""

    @property
    def weight(self) -> Tensor:
        """|weight|."""

    @property
    def uniform(self) -> Tensor:
        """Random in [0, 1): of seed, step, name and position alone, so the same on any sharding."""


class ElementMagnitudes:
    """Of the elements ``at`` of slice ``i``."""

    def __init__(self, inputs: StepInputs, i: int, at: slice) -> None:
        self.inputs, self.i, self.at = inputs, i, at

    @property
    def risk(self) -> Tensor:
        assert self.inputs.risk_grads is not None
        return self.inputs.risk_grads[self.i][self.at].abs().float()

    @property
    def signed_grad(self) -> Tensor:
        """The task gradient with its sign."""
        return self.inputs.grad(self.i, self.at)

    @property
    def grad(self) -> Tensor:
        return self.signed_grad.abs_()

    @property
    def alpha_grad(self) -> Tensor:
        return self.grad.mul_(1 - self.inputs.beta1s[self.i])

    @property
    def next_momentum(self) -> Tensor:
        """exp_avg as an update without a mask would leave it, with its sign."""
        return self.inputs.exp_avgs[self.i][self.at].float().lerp(self.signed_grad, 1 - self.inputs.beta1s[self.i])

    @property
    def momentum(self) -> Tensor:
        return self.inputs.exp_avgs[self.i][self.at].abs().float()

    @property
    def weight(self) -> Tensor:
        return self.inputs.weights[self.i][self.at].abs().float()

    @property
    def uniform(self) -> Tensor:
        layout = self.inputs.layout
        positions = layout.blocks[self.i].positions(self.at, self.inputs.grads[self.i].device)
        return uniform(self.inputs, layout.name_of(self.i), positions)


class TensorMagnitudes:
    """Frobenius norms over all ranks, one a tensor, on the CPU. Each property is a collective."""

    def __init__(self, inputs: StepInputs, kernels: Any | None = None) -> None:
        self.inputs, self.kernels = inputs, kernels

    @property
    def risk(self) -> Tensor:
        assert self.inputs.risk_grads is not None
        return self._norms(self.inputs.risk_grads)

    @property
    def grad(self) -> Tensor:
        return self._norms(self._grads, [float(self.inputs.scale)] * len(self._grads))

    @property
    def alpha_grad(self) -> Tensor:
        # alpha belongs to the tensor's group, which a rank without a slice of it does not know: scale before the sum
        return self._norms(self._grads, [float(self.inputs.scale) * (1 - beta1) for beta1 in self.inputs.beta1s])

    @property
    def momentum(self) -> Tensor:
        return self._norms(self.inputs.exp_avgs)

    @property
    def weight(self) -> Tensor:
        return self._norms(self.inputs.weights)

    @property
    def uniform(self) -> Tensor:
        first = torch.zeros(1, dtype=torch.int64)
        return torch.cat([uniform(self.inputs, name, first) for name in self.inputs.layout.names])

    @cached_property
    def _grads(self) -> Sequence[Tensor]:
        """Still to be multiplied with ``scale``."""
        x = self.inputs
        if not x.share or x.risk_grads is None:
            return x.grads
        return [x.grad(i, slice(None)).div_(x.scale) for i in range(len(x.grads))]

    def _norms(self, slices: Sequence[Tensor], scales: Sequence[float] | None = None) -> Tensor:
        layout = self.inputs.layout

        def local(mine: list[int]) -> Tensor:
            return squared_norms(
                [slices[i] for i in mine],
                [layout.tensor_index[i] for i in mine],
                layout.tensor_count,
                None if scales is None else [scales[i] for i in mine],
                self.kernels,
            )

        return layout.over_ranks(local).sqrt().float()


def uniform(inputs: StepInputs, name: str, positions: Tensor) -> Tensor:
    """Counter-based random numbers in [0, 1), fp32: a hash of seed, step, name and each position."""
    low, high = keys(inputs, name)
    mixed = _fmix32((positions & 0xFFFFFFFF) ^ low)
    mixed = _fmix32(mixed ^ high ^ (positions >> 32))
    return (mixed >> 8).float() / (1 << 24)


def keys(inputs: StepInputs, name: str) -> tuple[int, int]:
    """Of seed, step and name, what a position is hashed with: 32 bits each."""
    digest = hashlib.blake2b(f"{inputs.seed}/{inputs.step}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _fmix32(x: Tensor) -> Tensor:
    """MurmurHash3's finalizer on the low 32 bits of int64, whose products wrap."""
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        x = ((x ^ (x >> shift)) * multiplier) & 0xFFFFFFFF
    return x ^ (x >> 16)
