"""The exact k-th smallest of non-negative floats that nobody holds all of.

Non-negative IEEE floats sort like their bit patterns. Three rounds of histograms over the bits (12 + 10 + 10) pin down
the k-th smallest pattern; each round exchanges one small integer histogram, whatever the number of values. Integer sums
do not depend on their order, so every rank computes the same bits at every world size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

#: Takes this rank's tensor, returns one row a rank (or a single, summed row): shape (rows, *local.shape).
Exchange = Callable[[Tensor], Tensor]


@runtime_checkable
class Counted(Protocol):
    """Values that are counted where they lie."""

    def histogram(self, prefix: int, shift: int, width: int) -> Tensor:
        """Counts, shape (2**width,) int64, by the bits [shift, shift + width) of values whose higher ones are these."""


#: Values that one set of ranks shares out among its members, and how these ranks exchange counts.
Spread = tuple[Iterable[Tensor] | Counted, Exchange]

_ROUNDS = ((20, 12), (10, 10), (0, 10))  # (shift, width) in bits, most significant first
_INFINITY = 0x7F8  # the top 12 bits of +inf; above it lie NaNs, from 0x800 on negative numbers and from 0xFF8 on NaNs
_CHUNK = 1 << 20  # values at a time: bounds the scratch memory of a round


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
    """Counts of the finite values over all ranks by their top 12 bits, eight bins an octave: shape (2040,), int64."""


def local_only(counts: Tensor) -> Tensor:
    """The exchange of a process that holds every value itself."""
    return counts.unsqueeze(0)


def kth_smallest(
    spreads: Sequence[Spread],
    k: int | Callable[[Tensor], int],
    *,
    largest: bool = False,
    fixed: float | None = None,
) -> Threshold:
    """The k-th smallest (1-based) of all values in ``spreads``; ``chunks`` are iterated once for each round.

    Args:
        spreads: each a re-iterable of floating tensors (any shape; empty is fine) and the exchange between its ranks.
        k: 1 <= k <= number of values over all ranks; or what chooses it, by ``Threshold.histogram``.
        largest: count the values from the k-th smallest upwards as kept, instead of those up to it.
        fixed: count by this value instead of looking for the k-th smallest.

    Raises:
        ValueError: k out of range or a negative value; decided on exchanged counts, so on every rank alike.
    """
    wanted = None if fixed is None else int(torch.tensor(fixed).view(torch.int32))
    prefix, below, infinite, zeros, last = 0, 0, 0, 0, 0
    spread: Tensor | None = None
    totals = rows_below = torch.zeros((), dtype=torch.int64)
    for depth, (shift, width) in enumerate(_ROUNDS):
        rows = [exchange(_histogram(chunks, prefix, shift, width)) for chunks, exchange in spreads]
        counts = torch.stack([r.sum(0) for r in rows]).sum(0)
        if depth == 0:
            infinite, nan, total = int(counts[_INFINITY]), _check(counts), int(counts.sum())
            zeros = int(counts[0])
            totals, spread = rows[0].sum(1), counts[:_INFINITY].cpu()
            last = k(spread) if callable(k) else k
            if not 1 <= last <= total:
                raise ValueError(f"k={last} must be in [1, {total}], the number of values over all ranks")
            if nan:
                return Threshold(float("nan"), 0, None, infinite, nan)
        cumulative = counts.cumsum(0)
        if wanted is None:
            digit = int(torch.searchsorted(cumulative, last - below))
        else:
            digit = wanted >> shift & (1 << width) - 1
        rows_below = rows_below.to(counts.device) + rows[0][:, :digit].sum(1)
        below += int(cumulative[digit - 1]) if digit else 0
        prefix = (prefix << width) | digit
    if largest:
        kept, kept_rows = total - below, totals - rows_below
    else:
        kept, kept_rows = below + int(counts[digit]), rows_below + rows[0][:, digit]
    value = torch.tensor(prefix, dtype=torch.int32).view(torch.float32).item()
    alone = len(spreads) > 1 or (len(kept_rows) == 1 and spreads[0][1] is not local_only)
    return Threshold(value, kept, None if alone else tuple(kept_rows.tolist()), infinite, 0, zeros, spread)


def _histogram(chunks: Iterable[Tensor] | Counted, prefix: int, shift: int, width: int) -> Tensor:
    """Counts, shape (2**width,) int64, of this rank's values by the bits [shift, shift + width) below ``prefix``."""
    if isinstance(chunks, Counted):
        return chunks.histogram(prefix, shift, width)
    histogram = None
    for chunk in chunks:
        if histogram is None:
            histogram = torch.zeros(1 << width, dtype=torch.int64, device=chunk.device)
        for piece in chunk.detach().reshape(-1).split(_CHUNK):
            # + 0.0 turns -0.0 into 0.0, whose bits sort first
            bits = (piece.float() + 0.0).view(torch.int32)
            if shift + width < 32:
                bits = bits[(bits >> (shift + width)) == prefix]
            digits = (bits >> shift) & ((1 << width) - 1)
            histogram += torch.bincount(digits, minlength=1 << width)
    return torch.zeros(1 << width, dtype=torch.int64) if histogram is None else histogram


def _check(counts: Tensor) -> int:
    """Number of NaNs in the first round's counts; raises on negative values."""
    negative = int(counts[0x800:0xFF8].sum()) + int(counts[0xFF8])  # 0xFF8 is -inf
    if negative:
        raise ValueError(f"{negative} values are negative; only non-negative values can be ranked by their bits")
    return int(counts[_INFINITY + 1 : 0x800].sum()) + int(counts[0xFF9:].sum())
