"""Directions in the space of weights, and points along them (Eq. 6 and Eq. 7)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Weights = dict[str, Tensor]


class Parameters(Protocol):
    """A module, or what of a sharded one lies on this rank."""

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """To be written in place."""


def weights_of(model: Parameters) -> Weights:
    """A copy of all parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def drawn_for(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal numbers for a parameter, fp32 on the CPU; they depend on nothing but the arguments."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def filter_lengths(tensor: Tensor, *, by_column: bool) -> Tensor:
    """The L2 norm of what belongs to each first index, or of each column, fp32."""
    weights = tensor.detach().float()
    return weights.norm(dim=0) if by_column else weights.flatten(1).norm(dim=1)


def filtered_by_column(module: nn.Module) -> set[str]:
    """Names of the matrices whose columns are the output neurons: GPT-2 stores them the other way round."""
    return {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, Conv1D)}


def filter_normalised(module: nn.Module, seed: int) -> Weights:
    """A Gaussian direction, filter by filter as long as the weights (Li et al., NeurIPS 2018; Eq. 6).

    A filter is one output neuron's row of a matrix (``filtered_by_column``: its column; of an embedding, one token or
    position), or the first index of a tensor with more dimensions. Biases and norms, vectors all, are zero: they do not
    move. Each tensor's numbers come from the seed and its name, so two models of one architecture get the same draw,
    scaled to each.
    """
    direction, columns = {}, filtered_by_column(module)
    for name, p in module.named_parameters():
        if p.dim() < 2:
            direction[name] = torch.zeros_like(p)
            continue
        drawn = drawn_for(name, p.shape, seed).to(p.device)
        by_column = name in columns
        scale = filter_lengths(p, by_column=by_column) / filter_lengths(drawn, by_column=by_column).clamp_min(1e-12)
        direction[name] = drawn.mul_(scale if by_column else scale.view(-1, *[1] * (p.dim() - 1))).to(p.dtype)
    return direction


@torch.no_grad()
def move(model: Parameters, start: Weights, steps: Sequence[tuple[float, Weights]]) -> None:
    """Set the weights to ``start + sum(a * direction)``."""
    for name, p in model.named_parameters():
        value = start[name].clone()
        for amount, direction in steps:
            value.add_(direction[name], alpha=amount)
        p.copy_(value)


@torch.no_grad()
def blend(model: Parameters, one: Weights, other: Weights, amount: float) -> None:
    """Set the weights to ``(1 - a) * one + a * other`` (Eq. 7); exactly one of them where a is 0 or 1."""
    for name, p in model.named_parameters():
        if amount in (0, 1):
            p.copy_((one, other)[int(amount)][name])
        else:
            p.copy_((1 - amount) * one[name] + amount * other[name])


@contextmanager
def restored(model: Parameters) -> Iterator[Weights]:
    """The weights as they are now, which they are again afterwards, bit for bit."""
    before = weights_of(model)
    try:
        yield before
    finally:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(before[name])
