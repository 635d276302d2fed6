"""What lies on this rank of the tensors that all ranks share out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rose_ds.core.threshold import Exchange


@dataclass(frozen=True)
class Block:
    """Where a slice lies in its whole tensor: an n-dimensional box, in row-major order."""

    shape: tuple[int, ...]
    """Of the whole tensor; flattened, (numel,), where the slice is contiguous."""
    start: tuple[int, ...]
    extent: tuple[int, ...]
    """Their product is the slice's number of elements."""

    @classmethod
    def flat(cls, whole: int, start: int, numel: int) -> Block:
        """Elements [start, start + numel) of a tensor of ``whole`` elements."""
        return cls((whole,), (start,), (numel,))

    @property
    def numel(self) -> int:
        """Elements of the slice."""
        return math.prod(self.extent)

    @property
    def first(self) -> int | None:
        """Position in the flattened whole tensor of the slice's first element; None where the others do not follow it
        one by one.
        """
        position, stride, whole = 0, 1, True
        for size, first, extent in reversed(list(zip(self.shape, self.start, self.extent, strict=True))):
            if extent > 1 and not whole:
                return None
            whole = whole and extent == size
            position += first * stride
            stride *= size
        return position

    def positions(self, at: slice = slice(None), device: torch.device | None = None) -> Tensor:
        """Positions in the flattened whole tensor of the slice's elements ``at``: int64, 1-D."""
        rest = torch.arange(*at.indices(self.numel), device=device)
        position, stride = torch.zeros_like(rest), 1
        for size, first, extent in reversed(list(zip(self.shape, self.start, self.extent, strict=True))):
            position += (rest % extent + first) * stride
            rest = rest // extent
            stride *= size
        return position


@dataclass(frozen=True)
class Layout:
    """What this rank holds of the eligible parameters; lists are aligned, one entry a slice."""

    tensor_index: Sequence[int]
    """Which eligible tensor (0 .. tensor_count - 1, numbered alike on every rank) a slice is part of."""
    exchange_of: Sequence[Exchange]
    """How a slice's ranks exchange counts and sums; slices with the same exchange are added before it is called."""
    exchanges: Sequence[Exchange]
    """Every exchange of the model, in the same order on every rank, whether or not this rank holds a slice of it."""
    tensor_count: int
    element_count: int
    """Over all ranks; padding and replicas not counted."""
    names: Sequence[str] = ()
    """Of the eligible tensors, by their number."""
    blocks: Sequence[Block] = ()
    """Where each slice lies in its tensor."""

    def name_of(self, i: int) -> str:
        """Of the tensor that slice ``i`` is part of."""
        return self.names[self.tensor_index[i]]

    def slices_of(self, exchange: Exchange) -> list[int]:
        """Indices of the slices that this exchange counts."""
        return [i for i, e in enumerate(self.exchange_of) if e is exchange]

    def over_ranks(self, local: Callable[[list[int]], Tensor]) -> Tensor:
        """Sums over all ranks by tensor, fp64, shape (tensor_count,). A collective.

        Args:
            local: this rank's sums over some of its slices, given their indices.
        """
        total = torch.zeros(self.tensor_count, dtype=torch.float64)
        for exchange in self.exchanges:
            total += exchange(local(self.slices_of(exchange))).sum(0).cpu()
        return total

    def sums(self, per_slice: Sequence[Tensor]) -> Tensor:
        """``over_ranks`` of one number a slice."""

        def local(mine: list[int]) -> Tensor:
            if not mine:
                return torch.zeros(self.tensor_count, dtype=torch.float64)
            values = torch.stack([per_slice[i].double() for i in mine])  # read once, where they lie
            index = torch.tensor([self.tensor_index[i] for i in mine], device=values.device)
            return values.new_zeros(self.tensor_count).index_add_(0, index, values)

        return self.over_ranks(local)
