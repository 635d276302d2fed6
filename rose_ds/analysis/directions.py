"""Directions in the space of weights, and points along them (Eq. 6 and Eq. 7)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


def weights_of(module: nn.Module) -> Weights:
    """A copy of all parameters, by name."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def filter_normalised(module: nn.Module, seed: int) -> Weights:
    """A Gaussian direction, filter by filter as long as the weights (Li et al., NeurIPS 2018; Eq. 6).

    A filter is a row of a matrix (one output neuron; of an embedding, one token or position), or the first index of a
    tensor with more dimensions. Biases and norms, vectors all, are zero: they do not move. Each tensor's numbers come
    from the seed and its name, so two models of one architecture get the same draw, scaled to each.
    """
    direction = {}
    for name, p in module.named_parameters():
        if p.dim() < 2:
            direction[name] = torch.zeros_like(p)
            continue
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        drawn = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.device)
        lengths = p.detach().float().flatten(1).norm(dim=1)
        drawn_lengths = drawn.flatten(1).norm(dim=1).clamp_min(1e-12)
        shape = (-1, *[1] * (p.dim() - 1))
        direction[name] = drawn.mul_((lengths / drawn_lengths).view(shape)).to(p.dtype)
    return direction


@torch.no_grad()
def move(module: nn.Module, start: Weights, steps: Sequence[tuple[float, Weights]]) -> None:
    """Set the weights to ``start + sum(a * direction)``."""
    for name, p in module.named_parameters():
        value = start[name].clone()
        for amount, direction in steps:
            value.add_(direction[name], alpha=amount)
        p.copy_(value)


@torch.no_grad()
def blend(module: nn.Module, one: Weights, other: Weights, amount: float) -> None:
    """Set the weights to ``(1 - a) * one + a * other`` (Eq. 7); exactly one of them where a is 0 or 1."""
    for name, p in module.named_parameters():
        if amount in (0, 1):
            p.copy_((one, other)[int(amount)][name])
        else:
            p.copy_((1 - amount) * one[name] + amount * other[name])


@contextmanager
def restored(module: nn.Module) -> Iterator[Weights]:
    """The weights as they are now, which they are again afterwards, bit for bit."""
    before = weights_of(module)
    try:
        yield before
    finally:
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(before[name])
