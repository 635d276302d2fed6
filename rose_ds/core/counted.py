"""Non-negative floats that are counted where they lie, by the bits of what they are in fp32, which sort as they do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

INFINITY = 0x7F8  # the top 12 bits of +inf; above it lie NaNs, from 0x800 on negative numbers and from 0xFF8 on NaNs
FACTS = 6  # numbers in a scan's row before its counts
SAMPLE_SHIFT = 17  # bits that a sample leaves away
SCAN_SHIFT = 11  # bits that it leaves away where it is looked at closely, and that the ends of a scan's window lack
LOWEST = (127 - 48) << 6  # the top 15 bits of 2**-48
_MINUS_INFINITY = -8  # its top 12 bits, read with their sign
_CHUNK = 1 << 20  # values at a time: bounds the scratch memory of a round


@runtime_checkable
class Counted(Protocol):
    """Values that are counted where they lie. Bits are those of the values in fp32; all counts are int64."""

    def histogram(self, prefix: int, shift: int, width: int) -> Tensor:
        """Counts, shape (2**width,), by the bits [shift, shift + width) of values whose higher ones are these."""

    def sample(self, stride: int) -> Tensor:
        """Counts of every ``stride``-th value, shape (4096,): 64 bins an octave from 2**-48 to 2**16, the first and the
        last with all that lies beyond.
        """

    def zoom(self, low: int, high: int) -> Tensor:
        """Counts of those values of the last sample whose top 15 bits are in [low, high) by their top 21 bits: shape
        ((high - low) * 64,).
        """

    def scan(self, low: int, high: int) -> Tensor:
        """One look at every value: how many there are, lie below, are infinite, NaN, negative, zero (``FACTS``), then
        counts of those whose top 21 bits are in [low, high) by their top 22 bits: shape (6 + (high - low) * 2,).
        """


class Chunks:
    """``Counted`` for floating tensors, a bounded piece of one at a time."""

    def __init__(self, chunks: Iterable[Tensor] = ()) -> None:
        self._chunks = chunks
        self.window = (0, 0)
        self.inside: list[Tensor] = []
        """Bits of the values in the window, from the scan."""
        self.drawn: list[Tensor] = []
        """Bits of the last sample's values."""

    def chunks(self) -> Iterable[Tensor]:
        """All values."""
        return self._chunks

    def every(self, stride: int) -> Iterator[Tensor]:
        """Every ``stride``-th value, as if the chunks were one."""
        start = 0
        for chunk in self.chunks():
            yield chunk.detach().reshape(-1)[start::stride]
            start = (start - chunk.numel()) % stride

    def histogram(self, prefix: int, shift: int, width: int) -> Tensor:
        found = None
        known = self.window[0] <= prefix << (shift + width) >> SCAN_SHIFT < self.window[1]
        source = self.inside if known and shift + width <= SCAN_SHIFT else self._bits()
        for bits in source:
            if shift + width < 32:
                bits = bits[(bits >> (shift + width)) == prefix]
            digits = (bits >> shift) & ((1 << width) - 1)
            counts = torch.bincount(digits, minlength=1 << width)
            found = counts if found is None else found.add_(counts)
        return torch.zeros(1 << width, dtype=torch.int64) if found is None else found

    def sample(self, stride: int) -> Tensor:
        found = torch.zeros(1 << 12, dtype=torch.int64)
        self.drawn = [bits_of(part) for part in self.every(stride)]
        for bits in self.drawn:
            bins = (bits >> SAMPLE_SHIFT).sub_(LOWEST).clamp_(0, 0xFFF)
            found = found.to(bits.device) + torch.bincount(bins, minlength=1 << 12)
        return found

    def zoom(self, low: int, high: int) -> Tensor:
        found = torch.zeros(high - low << 6, dtype=torch.int64)
        for bits in self.drawn:
            top = bits >> SAMPLE_SHIFT
            bins = (bits[(top >= low) & (top < high)] >> SCAN_SHIFT) - (low << 6)
            found = found.to(bits.device) + torch.bincount(bins, minlength=high - low << 6)
        return found

    def scan(self, low: int, high: int) -> Tensor:
        self.window, self.inside = (low, high), []
        found = None
        for bits in self._bits():
            inside = bits[(bits >= low << SCAN_SHIFT) & (bits < high << SCAN_SHIFT)]
            self.inside.append(inside)
            counts = torch.bincount((inside >> 10) - (low << 1), minlength=high - low << 1)
            row = torch.cat([facts_of(bits, low << SCAN_SHIFT), counts])
            found = row if found is None else found.add_(row)
        return torch.zeros(FACTS + (high - low << 1), dtype=torch.int64) if found is None else found

    def _bits(self) -> Iterator[Tensor]:
        for chunk in self.chunks():
            yield from map(bits_of, chunk.detach().reshape(-1).split(_CHUNK))


def facts_of(bits: Tensor, bound: int | Tensor) -> Tensor:
    """What a scan's row begins with: int64, (FACTS,). ``bound``: of what is counted as below."""
    top = bits >> 20
    nan = (top > INFINITY) | (top < 0) & (top > _MINUS_INFINITY)
    facts = [(top >= 0) & (bits < bound), top == INFINITY, nan, (top < 0) & ~nan, top == 0]
    sums = torch.stack([fact.sum() for fact in facts])
    return torch.cat([torch.full_like(sums[:1], bits.numel()), sums])


def bits_of(values: Tensor) -> Tensor:
    """As int32; + 0.0 turns -0.0 into 0.0, whose bits sort first."""
    return (values.float() + 0.0).view(torch.int32)


def bits_of_number(value: float) -> int:
    """The bits of a number in fp32, as an integer."""
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))
