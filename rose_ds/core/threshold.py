"""The exact k-th smallest of non-negative floats that nobody holds all of.

Non-negative IEEE floats sort like their bit patterns. Three rounds of histograms over the bits (12 + 10 + 10) pin down
the k-th smallest pattern; each round exchanges one small integer histogram, whatever the number of values. Where these
are many, a sample says first where the pattern will lie: then one scan counts what is below, and looks closely at the
few around it alone. Integer sums do not depend on their order: every rank computes the same bits at every world size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import methodcaller
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

#: Takes this rank's tensor, returns one row a rank (or a single, summed row): shape (rows, *local.shape).
Exchange = Callable[[Tensor], Tensor]


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
        """One look at every value: how many there are, lie below, are infinite, NaN, negative, zero (``_FACTS``), then
        counts of those whose top 21 bits are in [low, high) by their top 22 bits: shape (6 + (high - low) * 2,).
        """


#: Values that one set of ranks shares out among its members, and how these ranks exchange counts.
Spread = tuple[Iterable[Tensor] | Counted, Exchange]

ROUNDS = ((20, 12), (10, 10), (0, 10))  # (shift, width) in bits, most significant first
INFINITY = 0x7F8  # the top 12 bits of +inf; above it lie NaNs, from 0x800 on negative numbers and from 0xFF8 on NaNs
_MINUS_INFINITY = -8  # its top 12 bits, read with their sign
_CHUNK = 1 << 20  # values at a time: bounds the scratch memory of a round
_FACTS = 6  # numbers in a scan's row before its counts
_SAMPLE = 1 << 16  # values of the sample, over all ranks; but no more than one of so many:
_EVERY = 1 << 6
_SAMPLE_SHIFT = 17  # bits that a sample leaves away
_SCAN_SHIFT = 11  # bits that it leaves away where it is looked at closely, and that the ends of a scan's window lack
_LOWEST = (127 - 48) << 6  # the top 15 bits of 2**-48
_WINDOW = 64  # bins of a sample that are looked at closely, at most: an octave
#: Values over all ranks from which a sample is worth a round of its own.
MANY = 1 << 20


@dataclass(frozen=True)
class Threshold:
    """Outcome of ``kth_smallest``; the same on every rank."""

    value: float
    """The k-th smallest, an fp32 value; NaN when there are NaNs."""
    kept: int
    """How many values are <= value (or >= value, where the largest are kept), ties included."""
    kept_per_rank: tuple[int, ...] | None
    """The same by rank, where the exchange tells the ranks apart."""
    infinite: int
    """How many values are +inf."""
    nan: int
    """How many values are NaN."""
    zeros: int = 0
    """How many values are zero, or below 2**-129, where fp32 has all but ended."""
    histogram: Tensor | None = field(default=None, compare=False, repr=False)
    """Counts of the finite values over all ranks by their top 12 bits, eight bins an octave: shape (2040,), int64. None
    where a sample was looked at instead."""


def local_only(counts: Tensor) -> Tensor:
    """The exchange of a process that holds every value itself."""
    return counts.unsqueeze(0)


def kth_smallest(
    spreads: Sequence[Spread],
    k: int | Callable[[Tensor], int],
    *,
    largest: bool = False,
    fixed: float | None = None,
    count: int | None = None,
) -> Threshold:
    """The k-th smallest (1-based) of all values in ``spreads``; iterables are iterated once for each round.

    Args:
        spreads: each a re-iterable of floating tensors (any shape; empty is fine) and the exchange between its ranks.
        k: 1 <= k <= number of values over all ranks; or what chooses it, by ``Threshold.histogram``.
        largest: count the values from the k-th smallest upwards as kept, instead of those up to it.
        fixed: count by this value instead of looking for the k-th smallest.
        count: how many values there are over all ranks. Where it is given and large, a sample guides the search, and
            there is no ``Threshold.histogram``.

    Raises:
        ValueError: k out of range or a negative value; decided on exchanged counts, so on every rank alike.
    """
    search = Search([(v if isinstance(v, Counted) else Chunks(v), exchange) for v, exchange in spreads])
    rounds: Sequence[tuple[int, int]] = ROUNDS
    wanted = None if fixed is None else bits_of_number(fixed)
    last = 0 if callable(k) else k
    if count is not None and count >= MANY and 1 <= last <= count and wanted is None and search.by_sample(last, count):
        rounds = ROUNDS[2:]
    for shift, width in rounds:
        counts = search.ask(methodcaller("histogram", search.prefix, shift, width))
        if shift == ROUNDS[0][0]:
            last = search.begin(counts, k)
        if search.nan:
            break
        search.narrow(counts, last, width, None if wanted is None else wanted >> shift & (1 << width) - 1)
    return search.threshold(largest)


class Search:
    """What the rounds so far have found out."""

    def __init__(self, spreads: Sequence[tuple[Any, Exchange]]) -> None:
        self.spreads = spreads
        self.prefix = 0
        """The k-th smallest's highest bits."""
        self.below = 0
        """How many values have lower ones."""
        self.with_prefix = 0
        self.total = self.infinite = self.nan = self.zeros = 0
        self.histogram: Tensor | None = None
        self.rows = torch.zeros(1, 1, dtype=torch.int64)
        """Of the first spread, what each rank answered."""
        self.rank_totals = self.rank_below = self.rank_with = torch.zeros(1, dtype=torch.int64)

    def ask(self, question: Callable[[Counted], Tensor]) -> Tensor:
        """The sum of all ranks' answers: a collective for each spread."""
        rows = [exchange(question(values)) for values, exchange in self.spreads]
        self.rows = rows[0]
        return torch.stack([r.sum(0) for r in rows]).sum(0)

    def begin(self, counts: Tensor, k: int | Callable[[Tensor], int]) -> int:
        """Read the first round's counts; k as a number."""
        self._check(
            int(counts.sum()), int(counts[INFINITY]), int(counts[INFINITY + 1 : 0x800].sum() + counts[0xFF9:].sum()),
            int(counts[0x800:0xFF9].sum()), int(counts[0]),
        )  # fmt: skip
        self.rank_totals, self.histogram = self.rows.sum(1), counts[:INFINITY].cpu()
        last = k(self.histogram) if callable(k) else k
        self._check_range(last)
        return last

    def by_sample(self, k: int, count: int) -> bool:
        """The first two rounds in one scan; False where the sample does not say where to look, or misses."""
        window = self.window(k / count, max(count // _SAMPLE, _EVERY))
        if window is None:
            return False
        low, high = window
        row = self.ask(methodcaller("scan", low, high))
        total, below, infinite, nan, negative, zeros = row[:_FACTS].tolist()
        self._check(total, infinite, nan, negative, zeros)
        self._check_range(k)
        inside = row[_FACTS:]
        if nan:
            return True
        if not below < k <= below + int(inside.sum()):
            return False
        self.rank_totals, self.rank_below, self.below = self.rows[:, 0], self.rows[:, 1], below
        self.rows = self.rows[:, _FACTS:]
        self.prefix = low
        self.narrow(inside, k, 1)  # a digit of more than one bit, where the window is more than one bin
        return True

    def window(self, quantile: float, stride: int) -> tuple[int, int] | None:
        """The top 21 bits [low, high) between which a quantile lies, by five standard deviations of a sample; None:
        beyond the sample's bins, or with too many of the values in between.
        """
        # odd: rows of matrices have even lengths, and all their columns should have a chance
        sample = self.ask(methodcaller("sample", stride | 1))
        drawn = int(sample.sum())
        at, spread = quantile * drawn, 5 * math.sqrt(quantile * (1 - quantile) * drawn) + 1
        first, last = at - spread, at + spread
        low, high = _between(sample, first, last)
        if low == 0 or high >= len(sample) or high - low > _WINDOW:
            return None
        # second-order risks may all lie in a few of these bins
        closer = self.ask(methodcaller("zoom", _LOWEST + low, _LOWEST + high))
        below = int(sample[:low].sum())
        start, end = _between(closer, first - below, last - below)
        if int(closer[start:end].sum()) * 3 > drawn:  # a heavy tie, say: then a scan that collects them is no gain
            return None
        origin = _LOWEST + low << _SAMPLE_SHIFT - _SCAN_SHIFT
        return origin + start, origin + end

    def narrow(self, counts: Tensor, k: int, width: int, digit: int | None = None) -> None:
        """Append the digit that the k-th smallest has, or this one."""
        cumulative = counts.cumsum(0)
        if digit is None:
            digit = int(torch.searchsorted(cumulative, k - self.below))
        self.rank_below = self.rank_below.to(self.rows.device) + self.rows[:, :digit].sum(1)
        self.below += int(cumulative[digit - 1]) if digit else 0
        self.with_prefix, self.rank_with = int(counts[digit]), self.rows[:, digit]
        self.prefix = (self.prefix << width) + digit

    def threshold(self, largest: bool) -> Threshold:
        """What came out."""
        if self.nan:
            return Threshold(float("nan"), 0, None, self.infinite, self.nan)
        if largest:
            kept, by_rank = self.total - self.below, self.rank_totals.to(self.rows.device) - self.rank_below
        else:
            kept, by_rank = self.below + self.with_prefix, self.rank_below + self.rank_with
        value = torch.tensor(self.prefix, dtype=torch.int32).view(torch.float32).item()
        together = len(self.spreads) > 1 or (len(by_rank) == 1 and self.spreads[0][1] is not local_only)
        rows = None if together else tuple(by_rank.tolist())
        return Threshold(value, kept, rows, self.infinite, 0, self.zeros, self.histogram)

    def _check(self, total: int, infinite: int, nan: int, negative: int, zeros: int) -> None:
        if negative:
            raise ValueError(f"{negative} values are negative; only non-negative values can be ranked by their bits")
        self.total, self.infinite, self.nan, self.zeros = total, infinite, nan, zeros

    def _check_range(self, k: int) -> None:
        if not 1 <= k <= self.total:
            raise ValueError(f"k={k} must be in [1, {self.total}], the number of values over all ranks")


def _between(counts: Tensor, first: float, last: float) -> tuple[int, int]:
    """The bins [low, high) that hold what ranks from ``first`` to ``last``."""
    ends = torch.tensor([first, last], device=counts.device)
    low, high = torch.searchsorted(counts.cumsum(0), ends).tolist()
    return low, min(high + 1, len(counts))


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
        known = self.window[0] <= prefix << (shift + width) >> _SCAN_SHIFT < self.window[1]
        source = self.inside if known and shift + width <= _SCAN_SHIFT else self._bits()
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
            bins = (bits >> _SAMPLE_SHIFT).sub_(_LOWEST).clamp_(0, 0xFFF)
            found = found.to(bits.device) + torch.bincount(bins, minlength=1 << 12)
        return found

    def zoom(self, low: int, high: int) -> Tensor:
        found = torch.zeros(high - low << 6, dtype=torch.int64)
        for bits in self.drawn:
            top = bits >> _SAMPLE_SHIFT
            bins = (bits[(top >= low) & (top < high)] >> _SCAN_SHIFT) - (low << 6)
            found = found.to(bits.device) + torch.bincount(bins, minlength=high - low << 6)
        return found

    def scan(self, low: int, high: int) -> Tensor:
        self.window, self.inside = (low, high), []
        found = None
        for bits in self._bits():
            inside = bits[(bits >= low << _SCAN_SHIFT) & (bits < high << _SCAN_SHIFT)]
            self.inside.append(inside)
            counts = torch.bincount((inside >> 10) - (low << 1), minlength=high - low << 1)
            top = bits >> 20
            nan = (top > INFINITY) | (top < 0) & (top > _MINUS_INFINITY)
            facts = [(top >= 0) & (bits < low << _SCAN_SHIFT), top == INFINITY, nan, top < 0, top == 0]
            sums = torch.stack([fact.sum() for fact in facts])
            sums[3] -= (nan & (top < 0)).sum()
            row = torch.cat([torch.full_like(sums[:1], bits.numel()), sums, counts])
            found = row if found is None else found.add_(row)
        return torch.zeros(_FACTS + (high - low << 1), dtype=torch.int64) if found is None else found

    def _bits(self) -> Iterator[Tensor]:
        for chunk in self.chunks():
            yield from map(bits_of, chunk.detach().reshape(-1).split(_CHUNK))


def bits_of(values: Tensor) -> Tensor:
    """As int32; + 0.0 turns -0.0 into 0.0, whose bits sort first."""
    return (values.float() + 0.0).view(torch.int32)


def bits_of_number(value: float) -> int:
    """The bits of a number in fp32, as an integer."""
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))
