"""How much to keep, from the global histogram of risks: no fraction to search for.

Both criteria work on ``Threshold.histogram``: counts by the top 12 bits of the fp32 risks, eight bins to an octave, so
that a bin's number is the logarithm of its risk. They compute with integers alone: ranks, and machines of several
kinds, cannot disagree. Risks of zero (bin 0) are always kept, and are no part of what is divided.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from torch import Tensor

#: From the histogram to the number of risks to keep (0 where none is finite): shape (2040,), int64.
Criterion = Callable[[Tensor], int]


def otsu(histogram: Tensor) -> int:
    """Otsu's threshold on the logarithm of the risk (IEEE Trans. SMC, 1979): two classes, low and high risk, with the
    largest variance between them. Keeps the low ones; all, where there is one risk only.
    """
    counts: list[int] = histogram.tolist()
    zeros, counts[0] = counts[0], 0
    total, moment = sum(counts), sum(i * n for i, n in enumerate(counts))
    best, kept = (0, 1), total
    weight = first = 0
    for i, n in enumerate(counts):
        weight, first = weight + n, first + i * n
        if n and weight < total:
            # the variance between the classes, times total**2
            found = (total * first - weight * moment) ** 2, weight * (total - weight)
            if found[0] * best[1] > best[0] * found[1]:
                best, kept = found, weight
    return zeros + kept


def knee(histogram: Tensor) -> int:
    """Keeps the risks below their mean: the knee (Satopaa et al., Kneedle, 2011) of the curve that gives the share of
    all risk that the lowest fraction of the parameters holds, where it is furthest from the diagonal.
    """
    counts: list[int] = histogram.tolist()
    zeros, counts[0] = counts[0], 0
    total = sum(counts)
    # twice the middle of each bin, in units of the smallest: (8 + mantissa + 1/2) * 2**exponent
    middles = [(17 + 2 * (i & 7)) << (i >> 3) for i in range(len(counts))]
    mass = sum(n * middle for n, middle in zip(counts, middles, strict=True))
    below = [kept for kept, middle in zip(accumulate(counts), middles, strict=True) if middle * total <= mass]
    return zeros + (below[-1] if below else total)


CRITERIA: dict[str, Criterion] = {"auto": otsu, "otsu": otsu, "knee": knee}
