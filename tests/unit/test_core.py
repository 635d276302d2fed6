"""Risks, masks and the update, against the paper's formulas written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from step_data import outcome, same, step_inputs
from torch import Tensor

from rose_ds import RoseConfig
from rose_ds.core import counting
from rose_ds.core.layout import Block, Layout
from rose_ds.core.magnitudes import ElementMagnitudes, StepInputs, uniform
from rose_ds.core.mask import FIRST, SECOND, add_mask_, keep_count
from rose_ds.core.risk import first_order_risk, second_order_risk, squared_norms
from rose_ds.core.select import Selection, select
from rose_ds.core.threshold import local_only
from rose_ds.core.update import adamw_, masked_adamw_
from rose_ds.masks import policy_of

pytestmark = pytest.mark.fast

INF = float("inf")
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- risks ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_first_order_risk(dtype: torch.dtype) -> None:
    """Eq. 2: the magnitude, in fp32, and the gradient itself untouched."""
    grad = torch.tensor([-2.0, 0.0, -0.0, 0.5, -INF], dtype=dtype)
    risk = first_order_risk(grad)
    assert risk.dtype == torch.float32
    assert risk.tolist() == [2.0, 0.0, 0.0, 0.5, INF]
    assert grad[0] == -2.0


#: (gradient, exp_avg, beta1, risk of Eq. 4)
SECOND_ORDER = [
    (1.0, 0.1, 0.9, 0.0),
    (-1.0, 0.1, 0.9, 0.0),  # magnitudes, not signs
    (3.0, -0.1, 0.9, 2.0),
    (0.0, 0.1, 0.9, 1.0),
    (3.0, 0.1, 0.5, 14.0),
    (5.0, 0.0, 0.9, 0.0),  # no history: kept
    (0.0, 0.0, 0.9, 0.0),
    (0.0, -0.0, 0.9, 0.0),
    (INF, 0.1, 0.9, INF),
    (INF, 0.0, 0.9, 0.0),
    (3e38, 1e-30, 0.9, INF),
]


@pytest.mark.parametrize(("grad", "exp_avg", "beta1", "risk"), SECOND_ORDER)
def test_second_order_risk(grad: float, exp_avg: float, beta1: float, risk: float) -> None:
    """Eq. 4 with alpha = 1 - beta1, and its x/0 decided; inputs are left alone."""
    g, m = torch.tensor([grad]), torch.tensor([exp_avg])
    before = g.clone(), m.clone()
    found = second_order_risk(g, m, beta1)
    assert found.item() == pytest.approx(risk, abs=1e-6)
    assert torch.equal(g, before[0]) and torch.equal(m, before[1])


def test_second_order_risk_of_nan() -> None:
    """A NaN stays one, for the threshold to count."""
    risk = second_order_risk(torch.tensor([math.nan, 1.0]), torch.tensor([1.0, math.nan]), 0.9)
    assert risk.isnan().all()


def test_squared_norms() -> None:
    """Slices of a tensor are summed in fp64, scaled by their own group's alpha; absent tensors are 0."""
    slices = [randn(7, seed=1), randn(5, seed=2), randn(3, seed=3)]
    found = squared_norms(slices, [2, 0, 2], 4, scales=[0.5, 2.0, 3.0])
    want = torch.zeros(4, dtype=torch.float64)
    want[2] = slices[0].double().square().sum() * 0.25 + slices[2].double().square().sum() * 9
    want[0] = slices[1].double().square().sum() * 4
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)
    assert squared_norms([], [], 3).tolist() == [0.0, 0.0, 0.0]


def test_squared_norms_do_not_depend_on_the_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rose_ds.core.risk._CHUNK", 10_000)  # copied to fp64 in parts
    whole = randn(100_003)
    pieces = list(whole.split(777))
    one = squared_norms([whole], [0], 1).sqrt().float()
    many = squared_norms(pieces, [0] * len(pieces), 1).sqrt().float()
    assert torch.equal(one, many)


# --- masks ---

#: floor(c * n), at least 1, whatever 0.29 * 100 == 28.999999999999996 says
KEEP = [
    (0.6, 5, 3),
    (0.29, 100, 29),
    (0.1, 3, 1),
    (1e-9, 10, 1),
    (1.0, 7, 7),
    (0.5, 1, 1),
    (0.999, 10, 9),
    (0.7, 10, 7),
]


@pytest.mark.parametrize(("fraction", "n", "k"), KEEP)
def test_keep_count(fraction: float, n: int, k: int) -> None:
    assert keep_count(fraction, n) == k


def test_add_mask() -> None:
    """Eq. 3 keeps ties at tau; the two orders use a bit each."""
    codes = torch.zeros(4, dtype=torch.uint8)
    add_mask_(codes, torch.tensor([1.0, 2.0, 3.0, 2.0]), 2.0, FIRST)
    assert codes.tolist() == [1, 1, 0, 1]
    add_mask_(codes, torch.tensor([[9.0, 0.0], [0.0, 9.0]]), 0.0, SECOND)
    assert codes.tolist() == [1, 3, 2, 1]


VALUES = [
    ("first", 0.3, {0: 0.0, 1: 1.0}),
    ("second", 0.3, {0: 0.0, 2: 1.0}),
    ("ensemble", 0.3, {0: 0.0, 1: 0.3, 2: 0.7, 3: 1.0}),
    ("ensemble", 0.0, {0: 0.0, 1: 0.0, 2: 1.0, 3: 1.0}),
    ("ensemble", 1.0, {0: 0.0, 1: 1.0, 2: 0.0, 3: 1.0}),
    ("random", 0.3, {0: 0.0, 1: 1.0}),
]


@pytest.mark.parametrize(("strategy", "gamma", "values"), VALUES)
def test_mask_values(strategy: Any, gamma: float, values: dict[int, float]) -> None:
    """Eq. 5, and hard masks; code 3 is always 1."""
    policy = policy_of(RoseConfig(strategy=strategy, gamma=gamma))
    assert policy is not None
    table = policy.values
    assert {code: table[code] for code in values} == pytest.approx(values)


# --- update ---

Literal = tuple[Tensor, Tensor, Tensor]


def algorithm_1(p: Tensor, g: Tensor, m: Tensor, v: Tensor, M: Tensor, t: int, h: dict[str, float]) -> Literal:
    """Lines 8 to 13, as printed."""
    used = M * g + (1 - M) * m
    m = h["beta1"] * m + (1 - h["beta1"]) * used
    v = h["beta2"] * v + (1 - h["beta2"]) * used**2
    m_hat, v_hat = m / (1 - h["beta1"] ** t), v / (1 - h["beta2"] ** t)
    return p - h["lr"] * (m_hat / (v_hat.sqrt() + h["eps"]) + h["weight_decay"] * p) * M, m, v


HYPER = {"lr": 0.03, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.1}
MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "hard": lambda u: (u > 0.4).to(u.dtype),
    "soft": lambda u: torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=u.dtype)[(u * 4).long()],
    "ones": torch.ones_like,
    "zeros": torch.zeros_like,
    "one value": lambda u: torch.tensor([0.3], dtype=u.dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_masked_adamw(mask: str, dtype: torch.dtype, weight_decay: float) -> None:
    """Six steps are Algorithm 1's, on two tensors at once."""
    h = {**HYPER, "weight_decay": weight_decay}
    params = [randn(5, 7, seed=1, dtype=dtype), randn(11, seed=2, dtype=dtype)]
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    want = [(p.clone(), m[i].clone(), v[i].clone()) for i, p in enumerate(params)]
    for t in range(1, 7):
        grads = [randn(*p.shape, seed=10 * t + i, dtype=dtype) for i, p in enumerate(params)]
        masks = [MASKS[mask](torch.rand(p.shape, generator=torch.Generator().manual_seed(t)).to(dtype)) for p in params]
        before = [g.clone() for g in grads]
        masked_adamw_(params, grads, m, v, masks, step=t, **h)
        assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True)), "gradients are read only"
        want = [algorithm_1(*w[:1], g, *w[1:], M, t, h) for w, g, M in zip(want, grads, masks, strict=True)]
    tolerance = TOLERANCE[dtype]
    for got, (p, m_, v_) in zip(zip(params, m, v, strict=True), want, strict=True):
        for ours, theirs in zip(got, (p, m_, v_), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_frozen() -> None:
    """Under a mask of 0 a weight and exp_avg keep their exact bits, and exp_avg_sq drifts to exp_avg**2 (line 10)."""
    p, m, v = randn(50, seed=1), randn(50, seed=2), randn(50, seed=3).abs()
    p0, m0 = p.clone(), m.clone()
    for t in range(1, 401):
        masked_adamw_([p], [randn(50, seed=t)], [m], [v], [torch.zeros(50)], step=t, **HYPER)
        assert torch.equal(p, p0) and torch.equal(m, m0)
    torch.testing.assert_close(v, m0**2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernel", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw(kernel: dict[str, bool], weight_decay: float) -> None:
    """The unmasked update is torch.optim.AdamW's, bit for bit."""
    shapes = [(5, 7), (11,), (1,)]
    ours = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    theirs = [torch.nn.Parameter(p.clone()) for p in ours]
    h = {**HYPER, "weight_decay": weight_decay}
    adam = torch.optim.AdamW(
        theirs, lr=h["lr"], betas=(h["beta1"], h["beta2"]), eps=h["eps"], weight_decay=weight_decay, **kernel
    )
    m, v = [torch.zeros_like(p) for p in ours], [torch.zeros_like(p) for p in ours]
    for t in range(1, 6):
        grads = [randn(*p.shape, seed=10 * t + i) for i, p in enumerate(ours)]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        adam.step()
        adamw_(ours, grads, m, v, step=t, **kernel, **h)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("beta1", [0.9, 0.4])
def test_mask_of_ones_is_adamw(beta1: float, weight_decay: float) -> None:
    """Bit for bit torch's fused one over several steps; infinities and NaNs too."""
    h = {**HYPER, "beta1": beta1, "weight_decay": weight_decay, "lr": 1e-3}
    n = 1 << 12  # a multiple of the vector's length: what is left over torch rounds differently
    a, b = ([randn(n, seed=1), torch.zeros(n), torch.zeros(n)] for _ in range(2))
    for step in range(1, 5):
        g = randn(n, seed=step)
        if step == 4:
            g[3], g[4] = INF, math.nan
        masked_adamw_([a[0]], [g], [a[1]], [a[2]], [torch.ones(n)], step=step, **h)
        adamw_([b[0]], [g], [b[1]], [b[2]], step=step, fused=True, **h)
        assert all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(a, b, strict=True)), step


@pytest.mark.parametrize("broadcast", [False, True])
def test_frozen_whatever_the_gradient(broadcast: bool) -> None:
    """A mask of 0 leaves -0.0 its sign, and does not multiply infinities and NaNs of the gradient with 0."""
    p, m = torch.tensor([-0.0, 1.0, -0.0, 2.0]), torch.tensor([-0.0, -0.0, 0.5, -0.5])
    v, g = torch.full((4,), 0.25), torch.tensor([1.0, INF, math.nan, -INF])
    before = p.clone(), m.clone()
    masked_adamw_([p], [g], [m], [v], [torch.zeros(1 if broadcast else 4)], step=3, **HYPER)
    for now, then in zip((p, m), before, strict=True):
        assert torch.equal(now.view(torch.int32), then.view(torch.int32))
    torch.testing.assert_close(v, HYPER["beta2"] * 0.25 + (1 - HYPER["beta2"]) * before[1].square())


def test_square_roots_are_correctly_rounded() -> None:
    """torch's on CPUs is not: parameters would depend on who computes the step."""
    v = randn(10_000).square()
    p, m = torch.zeros(10_000), torch.ones(10_000)
    h = {**HYPER, "lr": 1.0, "beta1": 0.0, "beta2": 0.0, "eps": 0.0, "weight_decay": 0.0}
    g = v.clone()
    masked_adamw_([p], [g], [m], [v], [torch.ones(10_000)], step=1, **h)
    assert torch.equal(p, -g / v.double().sqrt().float())


# --- selection ---


def select_for(config: RoseConfig, grads: list[Tensor], **inputs: Any) -> Selection:
    """Masks of whole tensors that lie in this process."""
    count = len(grads)
    blocks = [Block.flat(g.numel(), 0, g.numel()) for g in grads]
    names = [f"layer.{i}.weight" for i in range(count)]
    total = sum(g.numel() for g in grads)
    layout = Layout(list(range(count)), [local_only] * count, [local_only], count, total, names, blocks)
    zeros = [torch.zeros_like(g) for g in grads]
    given = {"exp_avgs": zeros, "weights": zeros, "beta1s": [0.9] * count, **inputs}
    policy = policy_of(config)
    assert policy is not None
    return select(policy.selectors, config.granularity, StepInputs(layout, grads, **given))


@pytest.mark.parametrize("granularity", ["element", "tensor"])
def test_kl_gradient_not_finite(granularity: Any) -> None:
    """inf or NaN in the KL gradient gives no masks: the step is to be skipped."""
    for bad in (math.nan, INF):
        grads = [randn(4), torch.tensor([1.0, bad])]
        config = RoseConfig(strategy="first", granularity=granularity)
        found = select_for(config, grads, risk_grads=grads)
        assert not found.finite and found.codes == []


@pytest.mark.parametrize("granularity", ["element", "tensor"])
def test_momentum_not_finite(granularity: Any) -> None:
    """NaN in exp_avg can never get well: raised, not skipped."""
    grads, moments = [randn(4), randn(3)], [randn(4, seed=5), torch.tensor([1.0, math.nan, 2.0])]
    config = RoseConfig(strategy="second", granularity=granularity)
    with pytest.raises(FloatingPointError, match="1 scores are NaN"):
        select_for(config, grads, exp_avgs=moments)


def test_alpha_is_each_groups() -> None:
    """beta1 of a slice's own group enters Eq. 4, per element and per tensor."""
    grads, moments = [torch.tensor([1.0]), torch.tensor([1.0])], [torch.tensor([0.1]), torch.tensor([0.1])]
    for granularity in ("element", "tensor"):
        config = RoseConfig(strategy="second", granularity=granularity, keep_second=0.5)  # type: ignore[arg-type]
        found = select_for(config, grads, exp_avgs=moments, beta1s=[0.5, 0.9])
        assert found.thresholds[SECOND].value == pytest.approx(0.0, abs=1e-6)
        assert [int(code) for code in found.codes] == [0, SECOND]


def test_what_an_objective_added_is_taken_out() -> None:
    """R-Drop's share of the ranked gradient, clipped alike, leaves the task gradient to Eq. 4."""
    task, kl, clip, share = [randn(5, seed=1), randn(7, seed=2)], [randn(5, seed=3), randn(7, seed=4)], 0.25, 1.5
    moments = [randn(5, seed=5), randn(7, seed=6)]
    whole = [(g + share * k) * clip for g, k in zip(task, kl, strict=True)]
    for granularity in ("element", "tensor"):
        config = RoseConfig(strategy="second", granularity=granularity)  # type: ignore[arg-type]
        want = select_for(config, [g * clip for g in task], exp_avgs=moments)
        for scale in (1.0, 0.125):  # ZeRO's gradients wait unclipped, still multiplied with a loss scale
            grads = [w / scale for w in whole]
            found = select_for(config, grads, exp_avgs=moments, risk_grads=kl, scale=scale, share=share, clip=clip)
            assert found.thresholds[SECOND].value == pytest.approx(want.thresholds[SECOND].value, rel=1e-4)
            assert [torch.as_tensor(c).tolist() for c in found.codes] == [
                torch.as_tensor(c).tolist() for c in want.codes
            ]


@pytest.mark.parametrize(("strategy", "want"), [("gradient-mask", [0, 0, 1, 1]), ("gallop", [0, 1, 0, 1])])
def test_largest_scores_are_kept(strategy: Any, want: list[int]) -> None:
    """|grad|, and |grad| / |weight|; a gradient of 0 on a weight of 0 scores 0."""
    grads, weights = [torch.tensor([0.0, 1.0, 2.0, -3.0])], [torch.tensor([0.0, 0.1, -5.0, 1.0])]
    found = select_for(RoseConfig(strategy=strategy, keep_first=0.5), grads, weights=weights)
    assert found.codes[0].tolist() == want  # type: ignore[union-attr]
    assert found.thresholds[FIRST].kept == 2


def test_random_mask_is_of_names_and_positions() -> None:
    """The same elements whatever the slices; another seed, step or name gives others."""
    config = RoseConfig(strategy="random", keep_first=0.5)
    whole = select_for(config, [torch.zeros(6, 10)]).codes[0]
    parts = []
    for columns in (slice(0, 3), slice(3, 10)):  # a column shard is not contiguous in its tensor
        extent = (6, columns.stop - columns.start)
        block = Block((6, 10), (0, columns.start), extent)
        layout = Layout([0], [local_only], [local_only], 1, 60, ["layer.0.weight"], [block])
        zeros = [torch.zeros(block.numel)]
        inputs = StepInputs(layout, zeros, zeros, zeros, [0.9])
        parts.append(ElementMagnitudes(inputs, 0, slice(None)).uniform.view(extent))
    drawn = torch.cat(parts, 1).flatten()
    assert drawn.min() >= 0 and drawn.max() < 1 and drawn.unique().numel() == 60
    assert torch.equal(whole, (drawn <= drawn.kthvalue(30).values).to(torch.uint8))  # type: ignore[arg-type]
    for other in ({"seed": 1}, {"step": 2}):
        assert not torch.equal(whole, select_for(config, [torch.zeros(6, 10)], **other).codes[0])  # type: ignore[arg-type]


def test_uniform_is_uniform() -> None:
    """Mean, spread and neighbours of 100,000 positions."""
    layout = Layout([], [], [], 0, 0)
    drawn = uniform(StepInputs(layout, [], [], [], []), "name", torch.arange(100_000)).double()
    assert abs(drawn.mean() - 0.5) < 0.005 and abs(drawn.var() - 1 / 12) < 0.002
    centred = drawn - drawn.mean()
    assert abs((centred[1:] * centred[:-1]).mean()) < 0.002
    counts = torch.histc(drawn, 100, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 150  # chi-square of 99 degrees: 0.999 quantile 149


def test_block_positions() -> None:
    """Row-major positions of a box in its tensor, whole and by parts."""
    whole = torch.arange(4 * 5 * 6).view(4, 5, 6)
    block = Block((4, 5, 6), (1, 2, 0), (2, 3, 5))
    want = whole[1:3, 2:5, 0:5].flatten()
    assert torch.equal(block.positions(), want) and torch.equal(block.positions(slice(7, 19)), want[7:19])
    assert torch.equal(Block.flat(100, 40, 5).positions(), torch.arange(40, 45))
    assert block.first is None and Block.flat(100, 40, 5).first == 40
    for start, extent, first in (
        ((1, 0, 0), (2, 5, 6), 30), ((2, 1, 0), (1, 3, 6), 66), ((2, 1, 4), (1, 1, 2), 70),
        ((0, 0, 3), (4, 5, 1), None), ((3, 4, 5), (1, 1, 1), 119),
    ):  # fmt: skip
        part = Block((4, 5, 6), start, extent)
        assert part.first == first
        assert first is None or torch.equal(part.positions(), torch.arange(first, first + part.numel))


@pytest.mark.parametrize("strategy", ["first", "second", "ensemble", "random", "gradient-mask", "gallop", "cautious"])
@pytest.mark.parametrize(("part", "kept"), [(1000, 0), (1000, 1 << 24), (70_000, 0)])
def test_slices_are_ranked_a_part_at_a_time(
    strategy: Any, part: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their last elements too, whether scores are kept or computed anew in every round."""
    inputs, config = step_inputs("ties", [70_001, 3, 0, 40_000], torch.float32), RoseConfig(strategy=strategy)
    want = outcome(config, inputs)
    monkeypatch.setattr(counting, "_CHUNK", part)
    monkeypatch.setattr(counting, "_KEPT", kept)
    found = outcome(config, inputs)
    assert same(want, found)
    assert [int(torch.as_tensor(code).numel()) for code in found.codes] == [70_001, 3, 0, 40_000]
