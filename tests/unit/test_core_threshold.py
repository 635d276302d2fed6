"""The exact k-th smallest: torch.kthvalue bit for bit, however the values are spread over chunks, parts and ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_data import saying
from thread_ranks import Group, at_once
from torch import Tensor

from rose_ds import kth_smallest as public
from rose_ds.core import counted, threshold
from rose_ds.core.counted import Chunks
from rose_ds.core.threshold import Threshold, Wanted, kth_smallest, kth_smallest_of_each, local_only

pytestmark = pytest.mark.fast

INF, NAN = float("inf"), float("nan")
DENORMAL, TINY = 1e-45, 1.1754943508222875e-38
#: few different values, so that there are ties; and anything that fp32 holds
VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, DENORMAL, 3 * DENORMAL, TINY, 0.5, 1.0, 1.0000001192092896, 3.4e38, INF]),
    st.floats(min_value=0.0, width=32, allow_infinity=True),
)
CHUNKS = st.lists(st.lists(VALUES, max_size=12), min_size=1, max_size=8).filter(lambda chunks: any(map(len, chunks)))
many = settings(max_examples=150, deadline=None)


def bits(value: Any) -> int:
    return int((torch.as_tensor(value, dtype=torch.float32) + 0.0).view(torch.int32))


def expected(values: Tensor, k: int) -> float:
    return values.float().flatten().kthvalue(k).values.item()


def local(chunks: list[Tensor], k: int) -> Threshold:
    return kth_smallest([(chunks, local_only)], k)


def on_ranks(world: int, job: Callable[[int, threshold.Exchange], Any], *, summed: bool = False) -> list[Any]:
    """``job(rank, exchange)`` on threads whose exchange is what all_gather (or all_reduce) of ``world`` ranks gives."""
    group = Group(list(range(world)), summed=summed)
    return at_once(world, lambda rank: job(rank, group.exchange_of(rank)))


@many
@given(CHUNKS, st.data())
def test_is_kthvalue(chunks: list[list[float]], data: st.DataObject) -> None:
    """Ties, zeros of both signs, denormals, infinities, empty chunks; k at both ends and between."""
    tensors = [torch.tensor(chunk) for chunk in chunks]
    every = torch.cat(tensors)
    n = every.numel()
    for k in {1, n, data.draw(st.integers(1, n))}:
        found = local(tensors, k)
        assert bits(found.value) == bits(expected(every, k))
        assert found.kept == int((every <= found.value).sum())
        assert found.kept_per_rank == (found.kept,)
        assert found.infinite == int(every.isinf().sum())
        assert bits(public(tensors, k)) == bits(found.value)


@many
@given(st.lists(CHUNKS, min_size=1, max_size=3), st.data())
def test_several_parts(parts: list[list[list[float]]], data: st.DataObject) -> None:
    """Parts with exchanges of their own are ranked together."""
    tensors = [[torch.tensor(chunk) for chunk in part] for part in parts]
    every = torch.cat([chunk for part in tensors for chunk in part])
    k = data.draw(st.integers(1, every.numel()))
    found = kth_smallest([(part, local_only) for part in tensors], k)
    assert bits(found.value) == bits(expected(every, k))
    assert found.kept == int((every <= found.value).sum())
    assert (found.kept_per_rank is None) == (len(parts) > 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.booleans(), st.data())
def test_ranks_agree(world: int, summed: bool, data: st.DataObject) -> None:
    """Whatever each rank holds, nothing included: every rank finds the same bits, and who kept how many."""
    held = [
        [torch.tensor(chunk) for chunk in data.draw(st.lists(st.lists(VALUES, max_size=6), max_size=3))]
        for _ in range(world)
    ]
    held[0].append(torch.tensor([0.25]))
    every = torch.cat([chunk for chunks in held for chunk in chunks])
    k = data.draw(st.integers(1, every.numel()))
    results = on_ranks(world, lambda rank, exchange: kth_smallest([(held[rank], exchange)], k), summed=summed)
    assert all(result == results[0] for result in results)
    assert bits(results[0].value) == bits(expected(every, k))
    kept = tuple(sum(int((chunk <= results[0].value).sum()) for chunk in chunks) for chunks in held)
    assert results[0].kept == sum(kept)
    assert results[0].kept_per_rank == (None if summed or world == 1 else kept)


# --- guided by a sample ---

LARGE_KINDS = ("normal", "near one", "ties", "zeros", "wide", "infinite", "nan", "sorted")


def many_values(kind: str, n: int) -> Tensor:
    draw = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=draw)
    if kind == "near one":
        return (x * 0.02 + 1).abs()
    if kind == "ties":
        return x.abs().mul(2).round()
    if kind == "zeros":
        return x.abs() * (torch.rand(n, generator=draw) < 0.3)
    if kind == "wide":
        return x.mul(60).exp2()
    if kind == "infinite":
        return torch.where(torch.arange(n) % 97 == 0, torch.tensor(INF), x.abs())
    if kind == "nan":
        return torch.where(torch.arange(n) == n // 2, torch.tensor(NAN), x.abs())
    return x.abs().sort().values if kind == "sorted" else x.exp()


@pytest.mark.parametrize("kind", LARGE_KINDS)
@pytest.mark.parametrize("largest", [False, True])
def test_a_sample_changes_nothing(kind: str, largest: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On uneven ranks, for fractions from one end to the other; where it guides, no histogram is exchanged."""
    monkeypatch.setattr(threshold, "_EVERY", 2)  # a sample large enough for 40,000 values
    monkeypatch.setattr(threshold, "MANY", 1)
    monkeypatch.setattr(counted, "_CHUNK", 3000)
    every = many_values(kind, 40_000)
    held = [[c] for c in every.split([1, 25_000, 14_999])]
    held[2] = list(held[2][0].split(4000))
    guided = 0
    for k in (1, 400, 16_000, 24_000, 39_999, 40_000):

        def found(rank: int, exchange: threshold.Exchange, k: int = k, count: int | None = None) -> Threshold:
            return kth_smallest([(held[rank], exchange)], k, largest=largest, count=count)

        plain = on_ranks(3, found)[0]
        results = on_ranks(3, lambda rank, exchange, k=k: found(rank, exchange, k, 40_000))  # type: ignore[misc]
        for result in results:
            assert repr(result) == repr(plain), k  # a NaN is not itself
        guided += results[0].histogram is None and not plain.nan
    assert guided >= (0 if kind in ("ties", "zeros", "wide", "nan") else 2)


@pytest.mark.parametrize("summed", [False, True])
def test_several_rankings(summed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finds what it finds alone, though one has no sample, one is misled by it, one ends early, and one knows its
    threshold; in as many exchanges as the longest takes alone.
    """
    monkeypatch.setattr(threshold, "_EVERY", 2)
    monkeypatch.setattr(threshold, "MANY", 1)
    kinds = ("normal", "near one", "ties", "nan", "sorted", "wide")
    held = [many_values(kind, 30_000).split([9_000, 1, 20_999]) for kind in kinds]
    wanted = [
        *(Wanted(k, largest) for k, largest in ((18_000, False), (400, True), (7, False), (3, False))),
        *(Wanted(lambda histogram: int(histogram.sum()) // 3), Wanted(1, largest=True, fixed=0.75)),
    ]
    asked: list[int] = []

    def counting(exchange: threshold.Exchange) -> threshold.Exchange:
        def counted_exchange(counts: Tensor) -> Tensor:
            asked.append(1)
            return exchange(counts)

        return counted_exchange

    def alone(i: int) -> Callable[[int, threshold.Exchange], Threshold]:
        want = wanted[i]
        return lambda rank, exchange: kth_smallest(
            [([held[i][rank]], counting(exchange))], want.k, largest=want.largest, fixed=want.fixed, count=30_000
        )

    apart, rounds = [], []
    for i in range(len(kinds)):
        asked.clear()
        apart.append(on_ranks(3, alone(i), summed=summed))
        rounds.append(len(asked))
    assert len(set(rounds)) > 1
    asked.clear()
    together = on_ranks(
        3,
        lambda rank, exchange: kth_smallest_of_each(
            [([Chunks([values[rank]]) for values in held], counting(exchange))], wanted, 30_000
        ),
        summed=summed,
    )
    assert len(asked) == max(rounds)
    for rank in range(3):
        assert [repr(found) for found in together[rank]] == [repr(found[rank]) for found in apart]


@pytest.mark.parametrize("window", [(384000, 384192), (531200, 531840), (512000, 520192)])
def test_a_sample_that_misleads(window: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that the value is not in, on either side, costs a scan; one that is wide finds it."""
    monkeypatch.setattr(threshold, "MANY", 1)
    monkeypatch.setattr(threshold.Search, "window", lambda *_: saying(window))
    every = many_values("normal", 20_000)
    for k in (500, 10_000, 19_500):
        found = kth_smallest([([every], local_only)], k, count=every.numel())
        assert found.value == expected(every, k)
        assert found.kept_per_rank == (k,)


@pytest.mark.parametrize(("bad", "match"), [(-1.0, "1 values are negative"), (-INF, "1 values are negative")])
def test_negative_with_a_sample(bad: float, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold, "MANY", 1)
    every = many_values("normal", 20_000)
    every[7] = bad
    with pytest.raises(ValueError, match=match):
        kth_smallest([([every], local_only)], 12_000, count=every.numel())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 700, 1000])
def test_read_in_fp32(dtype: torch.dtype, k: int) -> None:
    """Other precisions are converted to fp32 first: 16 bits exactly, fp64 rounded."""
    values = torch.rand(1000, generator=torch.Generator().manual_seed(k), dtype=torch.float64).to(dtype)
    assert local([values[:300].view(3, 100), values[300:]], k).value == expected(values, k)


@pytest.mark.parametrize("size", [5, 1000, 99_991])
def test_longer_than_a_piece(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Values are counted a bounded piece at a time."""
    monkeypatch.setattr(counted, "_CHUNK", 1000)
    values = torch.rand(size, generator=torch.Generator().manual_seed(size))
    for k in (1, size // 2 + 1, size):
        assert local([values], k).value == expected(values, k)


def test_neighbours_in_the_last_bits() -> None:
    """All three rounds of the histogram matter: values that differ only in the low 10, and the middle 10 bits."""
    base = torch.tensor(1.0).view(torch.int32).item()
    for spacing in (1, 1 << 10, 1 << 20):
        values = torch.arange(100, dtype=torch.int32).mul_(spacing).add_(base).view(torch.float32)
        for k in (1, 50, 100):
            assert bits(local([values.flip(0)], k).value) == base + (k - 1) * spacing


OUT_OF_RANGE = [([1.0, 2.0], 0), ([1.0, 2.0], 3), ([1.0, 2.0], -1), ([], 1)]


@pytest.mark.parametrize(("values", "k"), OUT_OF_RANGE)
@pytest.mark.parametrize("find", [local, public])
def test_k_out_of_range(find: Callable[..., Any], values: list[float], k: int) -> None:
    with pytest.raises(ValueError, match=rf"k={k} must be in \[1, {len(values)}\]"):
        find([torch.tensor(values)], k)


@pytest.mark.parametrize("bad", [-1.0, -DENORMAL, -INF])
@pytest.mark.parametrize("find", [local, public])
def test_negative(find: Callable[..., Any], bad: float) -> None:
    with pytest.raises(ValueError, match="1 values are negative"):
        find([torch.tensor([1.0, bad, 2.0])], 1)


@pytest.mark.parametrize("bad", [NAN, -NAN])
def test_nan(bad: float) -> None:
    """NaNs of both signs are counted; the public function raises."""
    values = torch.tensor([1.0, NAN, bad, INF])
    values[2] = torch.copysign(values[2], torch.tensor(-1.0))
    found = local([values], 1)
    assert found.nan == 2 and found.infinite == 1 and found.value != found.value
    with pytest.raises(ValueError, match="2 values are NaN"):
        public([values], 1)


@pytest.mark.parametrize("bad", [-1.0, NAN])
def test_every_rank_hears_of_it(bad: float) -> None:
    """A bad value on one rank stops all of them, or none: the decision is on exchanged counts."""
    held = [[torch.tensor([1.0])], [torch.tensor([bad])]]

    def job(rank: int, exchange: threshold.Exchange) -> str:
        try:
            return f"nan {kth_smallest([(held[rank], exchange)], 1).nan}"
        except ValueError as error:
            return str(error)

    first, second = on_ranks(2, job)
    assert first == second
    assert ("negative" in first) == (bad < 0)
