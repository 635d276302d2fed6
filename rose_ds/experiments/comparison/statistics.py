"""Whether one method's accuracy is another's by chance: over seeds, and over items and seeds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_Array = np.ndarray[Any, np.dtype[Any]]

RESAMPLES = 10_000
_SEED = 0


@dataclass(frozen=True)
class Difference:
    """Accuracy of a method less a baseline's."""

    points: float
    """In percentage points."""
    low: float
    high: float
    """95% interval of the bootstrap, in points."""
    p_bootstrap: float
    """One-sided: how often a resample shows no gain, and no less than 2^-seeds: that all seeds come out better happens
    so often where there is none."""
    p_t: float | None
    """One-tailed t-test over seeds; None with fewer than two seeds a side, or where none of them differ."""
    seeds: int
    """Pairs of runs with one seed."""


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); None with one value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def one_tailed_t(ours: Sequence[float], baseline: Sequence[float]) -> float | None:
    """p of Student's two-sample t-test over seeds that ``ours`` is not greater: the test of ROSE's paper."""
    from scipy import stats

    if min(len(ours), len(baseline)) < 2:
        return None
    if len(set(ours)) == len(set(baseline)) == 1:
        return None
    with warnings.catch_warnings():  # that seeds which end alike have next to no variance
        warnings.simplefilter("ignore", RuntimeWarning)
        p = float(stats.ttest_ind(ours, baseline, alternative="greater").pvalue)
    return None if math.isnan(p) else p


def compare(ours: _Array, baseline: _Array, resamples: int = RESAMPLES) -> Difference:
    """Paired bootstrap over items and seeds, both resampled: runs of one seed share items, so that averaging over seeds
    does not remove the error of having few items. Of n seeds n - 1 are drawn: as often as n, their mean would vary by
    (n - 1) / n of what it does, which is little for few seeds (Rao and Wu, JASA 1988).

    Args:
        ours, baseline: (seeds, items) of booleans, whether an item is answered rightly; rows of one seed, columns of
            one item.

    Raises:
        ValueError: their shapes differ, or are empty.
    """
    if ours.shape != baseline.shape or ours.ndim != 2 or not ours.size:
        raise ValueError(f"cannot pair answers of shape {ours.shape} with {baseline.shape}")
    gain = ours.astype(np.float64) - baseline.astype(np.float64)
    seeds, items = gain.shape
    # items that all runs answer alike are one: of how many there are of a kind, not which, a resample's mean is made
    kinds, counts = np.unique(gain.T, axis=0, return_counts=True)
    random = np.random.default_rng(_SEED)
    means = np.empty(resamples)
    for start in range(0, resamples, 1000):  # the counts of all resamples at once may take much memory
        count = min(1000, resamples - start)
        of_items = random.multinomial(items, counts / items, size=count) / items
        drawn = max(seeds - 1, 1)
        of_seeds = random.multinomial(drawn, np.full(seeds, 1 / seeds), size=count) / drawn
        means[start : start + count] = np.einsum("bs,bs->b", of_seeds, of_items @ kinds)
    low, high = np.quantile(means, (0.025, 0.975))
    least = 0.5**seeds if seeds > 1 else 0.0
    return Difference(
        points=100 * float(gain.mean()),
        low=100 * float(low),
        high=100 * float(high),
        p_bootstrap=max(float((np.count_nonzero(means <= 1e-12) + 1) / (resamples + 1)), least),
        p_t=one_tailed_t(ours.mean(axis=1).tolist(), baseline.mean(axis=1).tolist()),
        seeds=seeds,
    )
