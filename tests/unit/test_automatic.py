"""The automatic thresholds: against their definitions, on values that are hard on them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rose_ds.core.automatic import CRITERIA, knee, otsu
from rose_ds.core.threshold import Threshold, kth_smallest, local_only

pytestmark = pytest.mark.fast
RISKS = st.lists(st.sampled_from([0.0, 1e-30, 1e-8, 1e-3, 0.5, 1.0, 2.0, 1e9, 3e38]) | st.floats(0, 1e6, width=32))


def chosen(values: Tensor, criterion: str, largest: bool = False) -> Threshold:
    pick = CRITERIA[criterion]

    def k(histogram: Tensor) -> int:
        return values.numel() - pick(histogram) + 1 if largest else pick(histogram)

    return kth_smallest([([values], local_only)], k, largest=largest)


def mixture(low: int, high: int) -> Tensor:
    """Log-normal risks of two kinds, a factor of e**8 apart."""
    draw = torch.Generator().manual_seed(low)
    return torch.cat([torch.randn(low, generator=draw).exp() * 1e-4, torch.randn(high, generator=draw).exp() * 0.3])


@pytest.mark.parametrize(("low", "high"), [(5000, 5000), (8000, 2000), (2000, 8000)])
def test_otsu_finds_two_kinds(low: int, high: int) -> None:
    found = chosen(mixture(low, high), "auto")
    assert abs(found.kept - low) < 0.01 * (low + high)
    assert 1e-3 < found.value < 0.2


def test_otsu_is_scikit_images() -> None:
    """By its textbook form, on the bins' numbers: the largest variance between classes."""
    values = torch.randn(20000, generator=torch.Generator().manual_seed(1)).exp()
    bins = (values.view(torch.int32) >> 20).double()
    between = {}
    for at in bins.unique()[:-1].tolist():
        low, high = bins[bins <= at], bins[bins > at]
        between[at] = low.numel() * high.numel() * float(low.mean() - high.mean()) ** 2
    best = max(between, key=lambda at: between[at])
    assert chosen(values, "auto").kept == int((bins <= best).sum())


def test_knee_is_the_mean() -> None:
    """Where the Lorenz curve is furthest from the diagonal; up to the width of a bin."""
    values = torch.randn(50000, generator=torch.Generator().manual_seed(2)).exp()
    found = chosen(values, "knee")
    assert math.isclose(found.value, float(values.mean()), rel_tol=1 / 8)
    ordered = values.sort().values.double()
    share = ordered.cumsum(0) / ordered.sum()
    furthest = int((torch.arange(1, len(share) + 1) / len(share) - share).argmax()) + 1
    assert abs(found.kept - furthest) < 0.02 * len(values)


@settings(max_examples=200, deadline=None)
@given(RISKS.filter(bool), st.sampled_from(sorted(CRITERIA)))
def test_any_risks(values: list[float], criterion: str) -> None:
    """At least one is kept, zeros always, and what is kept is everything up to the threshold."""
    risks = torch.tensor(values, dtype=torch.float32)
    found = chosen(risks, criterion)
    assert 1 <= found.kept <= len(values)
    assert found.kept == int((risks <= found.value).sum())
    assert (risks[risks == 0] <= found.value).all()
    if len(set(risks.tolist())) == 1:
        assert found.kept == len(values)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_all_zero(criterion: str) -> None:
    found = chosen(torch.zeros(7), criterion)
    assert (found.value, found.kept, found.zeros) == (0.0, 7, 7)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scale_changes_nothing(criterion: str) -> None:
    """By powers of two, which the bins follow; and as many are kept of the largest as of the smallest."""
    values = mixture(3000, 2000)
    whole = chosen(values, criterion)
    for scale in (2.0**-40, 2.0**30):
        assert chosen(values * scale, criterion).kept == whole.kept
    turned = chosen(values, criterion, largest=True)
    assert turned.kept == whole.kept
    assert turned.value > whole.value or whole.kept > 2500


def test_counts_beyond_a_double() -> None:
    """Integers alone: a trillion risks, and one more."""
    histogram = torch.zeros(2040, dtype=torch.int64)
    histogram[800], histogram[1000] = 10**12, 10**12 + 1
    assert otsu(histogram) == knee(histogram) == 10**12
