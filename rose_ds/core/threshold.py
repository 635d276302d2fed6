"""The exact k-th smallest of non-negative floats that nobody holds all of.

Non-negative IEEE floats sort like their bit patterns. Three rounds of histograms over the bits (12 + 10 + 10) pin down
the k-th smallest pattern; each round exchanges one small integer histogram, whatever the number of values. Where these
are many, a sample says first where the pattern will lie: then one scan counts what is below, and looks closely at the
few around it alone. Integer sums do not depend on their order: every rank computes the same bits at every world size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from rose_ds.core.counted import FACTS, INFINITY, LOWEST, SAMPLE_SHIFT, SCAN_SHIFT, Chunks, Counted, bits_of_number

#: Takes this rank's tensor, returns one row a rank (or a single, summed row): shape (rows, *local.shape).
Exchange = Callable[[Tensor], Tensor]
#: Values that one set of ranks shares out among its members, and how these ranks exchange counts.
Spread = tuple[Iterable[Tensor] | Counted, Exchange]

ROUNDS = ((20, 12), (10, 10), (0, 10))  # (shift, width) in bits, most significant first
_SAMPLE = 1 << 16  # values of the sample, over all ranks; but no more than one of so many:
_EVERY = 1 << 6
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
        fixed: see Wanted.
        count: how many values there are over all ranks. Where it is given and large, a sample guides the search, and
            there is no ``Threshold.histogram``.

    Raises:
        ValueError: k out of range or a negative value; decided on exchanged counts, so on every rank alike.
    """
    held = [((v if isinstance(v, Counted) else Chunks(v),), exchange) for v, exchange in spreads]
    return kth_smallest_of_each(held, [Wanted(k, largest, fixed)], count)[0]


@dataclass(frozen=True)
class Wanted:
    """What ``kth_smallest`` is asked for."""

    k: int | Callable[[Tensor], int]
    """1-based; or what chooses it, by ``Threshold.histogram``."""
    largest: bool = False
    fixed: float | None = None
    """A threshold that is known, at or above which values are counted as kept (``largest``); k is not looked at. The
    last 11 bits of its fp32 pattern are 0.
    """


def kth_smallest_of_each(
    spreads: Sequence[tuple[Sequence[Counted], Exchange]], wanted: Sequence[Wanted], count: int | None = None
) -> list[Threshold]:
    """``kth_smallest`` in several rankings of the same elements: what they count in a round is exchanged together.

    Args:
        spreads: one ``Counted`` a ranking, and the exchange between their ranks.
        wanted: one a ranking.
        count: as there.
    """
    searches = [Search([exchange for _, exchange in spreads]) for _ in wanted]
    runs = [search.run(want, count) for search, want in zip(searches, wanted, strict=True)]
    asked = {i: next(run) for i, run in enumerate(runs)}
    while asked:
        rows = [_rows([values[i] for i in asked], list(asked.values()), exchange) for values, exchange in spreads]
        answers = dict(zip(asked, zip(*rows, strict=True), strict=True))
        asked = {i: question for i, answer in answers.items() if (question := _next(runs[i], answer)) is not None}
    return [search.threshold(want.largest) for search, want in zip(searches, wanted, strict=True)]


class Question(NamedTuple):
    """One of the methods of ``Counted``, and what it is called with."""

    method: str
    arguments: tuple[int, ...]


#: Asks every rank's values, and is told what each exchange has brought.
Asking = Generator[Question, Sequence[Tensor], None]


def _next(run: Asking, answer: Sequence[Tensor]) -> Question | None:
    try:
        return run.send(answer)
    except StopIteration:
        return None


def _rows(values: Sequence[Counted], questions: Sequence[Question], exchange: Exchange) -> Sequence[Tensor]:
    """What the ranks answer to each: (rows, counts)."""
    together = getattr(values[0], "scan_together", None)
    if together is not None and len(values) > 1 and all(question.method == "scan" for question in questions):
        counts = together(values, [question.arguments for question in questions])
    else:
        counts = [getattr(v, q.method)(*q.arguments) for v, q in zip(values, questions, strict=True)]
    if len(counts) == 1:
        return [exchange(counts[0])]
    return exchange(torch.cat(counts)).split([len(c) for c in counts], dim=1)


class Search:
    """What the rounds so far have found out."""

    def __init__(self, exchanges: Sequence[Exchange]) -> None:
        self.exchanges = exchanges
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

    def run(self, want: Wanted, count: int | None) -> Asking:
        """All rounds."""
        rounds: Sequence[tuple[int, int]] = ROUNDS
        if want.fixed is not None:
            at = bits_of_number(want.fixed) >> SCAN_SHIFT
            self.read_facts((yield from self.ask("scan", at, at)), want.fixed)
            return
        last = 0 if callable(want.k) else want.k
        known = count or 0
        guided = known >= MANY and 1 <= last <= known
        if guided and (yield from self.by_sample(last, known)):
            rounds = ROUNDS[2:]
        for shift, width in rounds:
            counts = yield from self.ask("histogram", self.prefix, shift, width)
            if shift == ROUNDS[0][0]:
                last = self.begin(counts, want.k)
            if self.nan:
                break
            self.narrow(counts, last, width)

    def ask(self, method: str, *arguments: int) -> Generator[Question, Sequence[Tensor], Tensor]:
        """The sum of all ranks' answers."""
        rows = yield Question(method, arguments)
        self.rows = rows[0]
        return rows[0].sum(0) if len(rows) == 1 else torch.stack([r.sum(0) for r in rows]).sum(0)

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

    def by_sample(self, k: int, count: int) -> Generator[Question, Sequence[Tensor], bool]:
        """The first two rounds in one scan; False where the sample does not say where to look, or misses."""
        window = yield from self.window(k / count, max(count // _SAMPLE, _EVERY))
        if window is None:
            return False
        low, high = window
        row = yield from self.ask("scan", low, high)
        total, below, infinite, nan, negative, zeros = row[:FACTS].tolist()
        self._check(total, infinite, nan, negative, zeros)
        self._check_range(k)
        inside = row[FACTS:]
        if nan:
            return True
        if not below < k <= below + int(inside.sum()):
            return False
        self.rank_totals, self.rank_below, self.below = self.rows[:, 0], self.rows[:, 1], below
        self.rows = self.rows[:, FACTS:]
        self.prefix = low
        self.narrow(inside, k, 1)  # a digit of more than one bit, where the window is more than one bin
        return True

    def read_facts(self, row: Tensor, fixed: float) -> None:
        """All rounds in one, where the threshold is known: a scan with an empty window, which begins there."""
        total, self.below, infinite, nan, negative, zeros = row.tolist()
        self._check(total, infinite, nan, negative, zeros)
        self.rank_totals, self.rank_below = self.rows[:, 0], self.rows[:, 1]
        self.prefix = bits_of_number(fixed)

    def window(self, quantile: float, stride: int) -> Generator[Question, Sequence[Tensor], tuple[int, int] | None]:
        """The top 21 bits [low, high) between which a quantile lies, by five standard deviations of a sample; None:
        beyond the sample's bins, or with too many of the values in between.
        """
        # odd: rows of matrices have even lengths, and all their columns should have a chance
        sample = yield from self.ask("sample", stride | 1)
        drawn = int(sample.sum())
        at, spread = quantile * drawn, 5 * math.sqrt(quantile * (1 - quantile) * drawn) + 1
        first, last = at - spread, at + spread
        low, high = _between(sample, first, last)
        if low == 0 or high >= len(sample) or high - low > _WINDOW:
            return None
        # second-order risks may all lie in a few of these bins
        closer = yield from self.ask("zoom", LOWEST + low, LOWEST + high)
        below = int(sample[:low].sum())
        start, end = _between(closer, first - below, last - below)
        if int(closer[start:end].sum()) * 3 > drawn:  # a heavy tie, say: then a scan that collects them is no gain
            return None
        origin = LOWEST + low << SAMPLE_SHIFT - SCAN_SHIFT
        return origin + start, origin + end

    def narrow(self, counts: Tensor, k: int, width: int) -> None:
        """Append the digit that the k-th smallest has."""
        cumulative = counts.cumsum(0)
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
        together = len(self.exchanges) > 1 or (len(by_rank) == 1 and self.exchanges[0] is not local_only)
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
