"""From risks to masks (Eq. 3 and Eq. 5).

A mask is kept as one byte for each parameter, a *code* with one bit for each ranking (for ROSE, bit 0 is the
first-order and bit 1 the second-order mask); a mask policy says which value of the mask belongs to codes 0 to 3. Where
kernels for CPUs make it, it is kept as these bits alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST, SECOND = 1, 2


@dataclass(frozen=True)
class BitMask:
    """Codes of a slice, one bit for each element and ranking."""

    words: Tensor
    """int64, (ceil(numel / 64), rankings): element i is bit i % 64 of word i // 64."""
    numel: int
    bits: tuple[int, ...]
    """Of the code, one for each ranking."""

    @classmethod
    def empty(cls, numel: int, bits: Sequence[int]) -> BitMask:
        """Not yet set."""
        return cls(torch.empty(-(-numel // 64), len(bits), dtype=torch.int64, device="cpu"), numel, tuple(bits))

    def codes(self) -> Tensor:
        """One byte for each element: uint8, (numel,)."""
        places = torch.arange(8, dtype=torch.uint8)
        # a word's lowest byte first, as on the processors that there are kernels for
        eights = self.words.view(torch.uint8).view(len(self.words), len(self.bits), 8, 1)
        found = torch.zeros(len(self.words), 8, 8, dtype=torch.uint8)
        for plane, bit in enumerate(self.bits):
            found |= (eights[:, plane] >> places & 1).mul_(bit)
        return found.view(-1)[: self.numel]

    def kept(self) -> Tensor:
        """How many elements have a code other than 0: int64, of no dimension."""
        ones = self.words[:, 0].clone()
        for plane in range(1, len(self.bits)):
            ones |= self.words[:, plane]
        # of each 2, 4 and 8 bits, then of all bytes, in the highest one; what a shift of a negative word fills in is
        # masked
        ones -= ones >> 1 & 0x5555555555555555
        ones = (ones & 0x3333333333333333) + (ones >> 2 & 0x3333333333333333)
        ones = ones + (ones >> 4) & 0x0F0F0F0F0F0F0F0F
        return (ones * 0x0101010101010101 >> 56).sum()


def keep_count(fraction: float, n: int) -> int:
    """k of Eq. 3: how many of ``n`` risks are kept, at least one. 1e-9 absorbs the rounding of e.g. 0.6 * 5."""
    return max(1, math.floor(fraction * n + 1e-9))


def add_mask_(codes: Tensor, score: Tensor, tau: float | Tensor, bit: int, *, largest: bool = False) -> Tensor:
    """Set ``bit`` of ``codes`` (uint8) where ``score <= tau`` (Eq. 3), or ``>= tau``; ties are kept. In place. ``tau``
    may lie on the scores' device: fp32, of no dimension.
    """
    kept = score >= tau if largest else score <= tau
    return codes.bitwise_or_(kept.to(torch.uint8).mul_(bit).view_as(codes))
