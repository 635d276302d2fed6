"""The exact k-th smallest on an accelerator: what the rounds find out stays there, and the host reads it once.

The rounds are those of ``rose_ds.core.threshold``, without the sample, whose use is decided on the host. All rankings
of a step go through them together: one exchange a round, one read in all. A number read on the host (``int()``,
``tolist()``, an index by a mask, ``bincount``) has the host wait for the device, which then runs empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rose_ds.core.counted import INFINITY, bits_of_number
from rose_ds.core.threshold import ROUNDS, Exchange, Search, Threshold, Wanted


class OnDevice(Protocol):
    """Values of several rankings, counted and marked where they lie, by numbers that lie there too."""

    def histogram(self, prefixes: Tensor, shift: int, width: int) -> Tensor:
        """``Counted.histogram`` of every ranking: int64, (rankings, 2**width). ``prefixes``: int64, (rankings,)."""

    def facts(self, bounds: Tensor) -> Tensor:
        """What a scan's row begins with, of every ranking: int64, (rankings, FACTS). ``bounds``: bits, (rankings,)."""

    def mark(self, taus: Tensor) -> None:
        """Set every ranking's bit of the codes, by its own threshold: fp32, (rankings,)."""


def numbers(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Shape (len(values),), with no copy from the host, which would have it wait."""
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])


def kth_smallest_on_device(
    spreads: Sequence[tuple[OnDevice, Exchange]], wanted: Sequence[Wanted], device: torch.device
) -> tuple[Tensor, Iterator[Threshold]]:
    """Thresholds of several rankings of the same elements.

    Args:
        spreads: values and the exchange between their ranks; every rank has them in the same order.
        wanted: one a ranking; for what chooses k by the histogram, the host reads the first round's counts too.
        device: on which the values lie.

    Returns:
        The thresholds, fp32, (rankings,), on the device; meaningless where an error follows or there are NaNs. And the
        same with all counts, one by one: the first that is asked for reads from the device, and each may raise what
        ``kth_smallest`` raises.
    """
    fixed = [w.fixed for w in wanted if w.fixed is not None]
    if fixed:
        assert len(fixed) == len(wanted), "thresholds are known, or looked for"
        bounds = numbers([bits_of_number(number) for number in fixed], device, torch.int32)
        facts = [exchange(values.facts(bounds)) for values, exchange in spreads]
        return bounds.view(torch.float32), _read_facts(facts, spreads, fixed)
    ks = [0 if callable(w.k) else w.k for w in wanted]
    last = numbers(ks, device)
    prefix = below = torch.zeros_like(last)
    rank_below = torch.zeros((), dtype=torch.int64, device=device)
    first = rank_totals = rank_below
    for shift, width in ROUNDS:
        rows = [exchange(values.histogram(prefix, shift, width)).to(device) for values, exchange in spreads]
        counts = torch.stack([r.sum(0) for r in rows]).sum(0)
        if shift == ROUNDS[0][0]:
            first, rank_totals = counts, rows[0].sum(2)
            if any(callable(w.k) for w in wanted):
                histograms = counts[:, :INFINITY].cpu()
                ks = [w.k(h) if callable(w.k) else w.k for w, h in zip(wanted, histograms, strict=True)]
                last = numbers(ks, device)
        cumulative = counts.cumsum(1)
        # clamped: a k out of range is an error, but not before the read
        digit = torch.searchsorted(cumulative, (last - below).unsqueeze(1))[:, 0].clamp_(max=(1 << width) - 1)
        at = digit.unsqueeze(1)
        with_prefix = counts.gather(1, at)[:, 0]
        below = below + cumulative.gather(1, at)[:, 0] - with_prefix
        of_rank = at.expand(len(rows[0]), -1, 1)
        rank_with = rows[0].gather(2, of_rank)[..., 0]
        rank_below = rank_below + rows[0].cumsum(2).gather(2, of_rank)[..., 0] - rank_with
        prefix = (prefix << width) + digit
    found = (first, rank_totals, below, with_prefix, prefix, rank_below, rank_with)
    return prefix.int().view(torch.float32), _read(found, spreads, wanted, ks)


def _read_facts(
    facts: Sequence[Tensor], spreads: Sequence[tuple[OnDevice, Exchange]], fixed: Sequence[float]
) -> Iterator[Threshold]:
    host = torch.cat([rows.reshape(-1) for rows in facts]).cpu().split([rows.numel() for rows in facts])
    parts = [h.view(rows.shape) for h, rows in zip(host, facts, strict=True)]
    for i, number in enumerate(fixed):
        search = Search([exchange for _, exchange in spreads])
        search.rows = parts[0][:, i]
        search.read_facts(torch.stack([part[:, i].sum(0) for part in parts]).sum(0), number)
        yield search.threshold(largest=True)


def _read(
    found: Sequence[Tensor], spreads: Sequence[tuple[OnDevice, Exchange]], wanted: Sequence[Wanted], ks: Sequence[int]
) -> Iterator[Threshold]:
    host = torch.cat([part.reshape(-1) for part in found]).cpu()
    parts = zip(host.split([part.numel() for part in found]), found, strict=True)
    counts, totals, below, with_prefix, prefix, rank_below, rank_with = (h.view(part.shape) for h, part in parts)
    for i, want in enumerate(wanted):
        search = Search([exchange for _, exchange in spreads])
        search.rows = totals[:, i : i + 1]
        search.begin(counts[i], ks[i])
        search.below, search.with_prefix, search.prefix = int(below[i]), int(with_prefix[i]), int(prefix[i])
        search.rank_below, search.rank_with = rank_below[:, i], rank_with[:, i]
        yield search.threshold(want.largest)
