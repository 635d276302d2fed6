"""Data that are hard on a ranking and on an update, for whatever computes what core computes."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from rose_ds.config import RoseConfig
from rose_ds.core.layout import Block, Layout
from rose_ds.core.magnitudes import StepInputs
from rose_ds.core.mask import BitMask
from rose_ds.core.select import Selection, select
from rose_ds.core.threshold import local_only
from rose_ds.core.update import UpdateBatch
from rose_ds.masks import policy_of


def values(kind: str, n: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=draw)
    if kind == "ties":
        x = x.mul(3).round().div(3)
    elif kind == "zeros":
        x = x * (torch.rand(n, generator=draw) < 0.3)
    elif kind == "minus zeros":
        x = torch.where(torch.rand(n, generator=draw) < 0.5, torch.tensor(-0.0), x)
    elif kind == "denormal":
        x = x * 1e-41
    elif kind == "wide":
        x = x * torch.exp2(torch.randint(-120, 120, (n,), generator=draw).float())
    elif kind == "equal":
        x = torch.full((n,), 0.37)
    elif kind == "infinite":
        x[n // 2 :: 7] = math.inf
    elif kind == "nan":
        x[n // 3 :: 11] = math.nan
    return x


KINDS = ("normal", "ties", "zeros", "minus zeros", "denormal", "wide", "equal")
SIZES = ([1], [5, 0, 17], [1000, 33, 257, 1], [70_001, 3, 40_000])


def step_inputs(kind: str, sizes: list[int], dtype: torch.dtype, scale: float = 0.7, share: float = 0.0) -> StepInputs:
    count = sum(sizes)
    cut = [list(values(kind, count, seed).split(sizes)) for seed in (1, 2, 3)]
    cut[1] = [m * 0.1 for m in cut[1]]
    layout = Layout(
        list(range(len(sizes))), [local_only] * len(sizes), [local_only], len(sizes), count,
        [f"t{i}" for i in range(len(sizes))], [Block.flat(n, 0, n) for n in sizes],
    )  # fmt: skip
    return StepInputs(
        layout, [g.to(dtype) for g in cut[0]], cut[1], cut[0], [0.9, 0.8, 0.95, 0.9][: len(sizes)],
        scale=scale, risk_grads=cut[2], share=share,
    )  # fmt: skip


def as_bits(codes: Tensor, bits: tuple[int, ...] = (1, 2)) -> BitMask:
    """The same mask, as kernels make it."""
    padded = torch.nn.functional.pad(codes, (0, -len(codes) % 64)).view(-1, 64)
    planes = [((padded & bit != 0).long() << torch.arange(64)).sum(1) for bit in bits]
    return BitMask(torch.stack(planes, 1), len(codes), bits)


def as_bytes(code: Any) -> Tensor:
    """Of a slice's mask, however it is kept."""
    return code.codes() if isinstance(code, BitMask) else torch.as_tensor(code)


def same(a: Selection, b: Selection) -> bool:
    assert a.finite == b.finite
    assert len(a.codes) == len(b.codes)
    codes = all(torch.equal(as_bytes(x), as_bytes(y)) for x, y in zip(a.codes, b.codes, strict=True))
    for bit, one in a.thresholds.items():
        other = b.thresholds[bit]
        assert (one.kept, one.infinite, one.nan, one.zeros) == (other.kept, other.infinite, other.nan, other.zeros)
        assert one.value == other.value or math.isnan(one.value)
        assert one.kept_per_rank == other.kept_per_rank
        assert (one.histogram is None) == (other.histogram is None)
        assert one.histogram is None or torch.equal(one.histogram, other.histogram)  # type: ignore[arg-type]
    return codes


def outcome(config: RoseConfig, inputs: StepInputs, *kernels: Any, **options: Any) -> Any:
    """The selection, or the message of the error."""
    policy = policy_of(config)
    assert policy is not None
    try:
        return select(policy.selectors, config.granularity, inputs, *kernels, **options)
    except (FloatingPointError, ValueError) as error:
        return str(error)


def alike(a: Any, b: Any) -> bool:
    """Of two outcomes."""
    return a == b if isinstance(a, str) or isinstance(b, str) else same(a, b)


GROUP = {"betas": (0.9, 0.98), "lr": 3e-3, "eps": 1e-8, "weight_decay": 0.01, "foreach": None, "fused": None}


def tensors(kind: str, sizes: list[int], dtype: torch.dtype) -> list[list[Tensor]]:
    """Parameters, gradients and moments by size."""
    made = [list(values("normal" if i == 0 else kind, sum(sizes), i).split(sizes)) for i in range(4)]
    return [[t.clone() for t in made[0]], [g.to(dtype) for g in made[1]], [t.clone() for t in made[2]], [
        t.square() for t in made[3]
    ]]  # fmt: skip


def codes_of(sizes: list[int], step: int, table: tuple[float, ...]) -> list[Any]:
    """Masks by element, and one by tensor: not of ones, which are another kernel of torch's."""
    draw = torch.Generator().manual_seed(step)
    codes: list[Any] = [torch.randint(0, 4, (n,), generator=draw, dtype=torch.uint8) for n in sizes]
    codes[2] = 2 if table[2] < 1 else 0
    return codes


def batch_of(held: list[list[Tensor]], codes: list[Any], *settings: Any, kernels: Any = None) -> UpdateBatch:
    """An update that is ready to be flushed; ``settings``: of UpdateBatch."""
    batch = UpdateBatch(*settings, kernels=kernels)
    for i, code in enumerate(codes):
        batch.add(code, tuple(column[i] for column in held))
    return batch


def check_same_bits(ours: list[list[Tensor]], theirs: list[list[Tensor]], what: object) -> None:
    """Of parameters, gradients and moments; NaNs are alike, zeros have a sign."""
    for column, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        for a, b in zip(mine, other, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), (what, column)
            assert torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan()), "the sign of zeros"


def saying(outcome: Any) -> Generator[Any, Any, Any]:
    """A part of a search that asks nothing."""
    yield from ()
    return outcome
