"""Worlds that no machine here has: each rank a thread, whose exchanges are what all_gather of the group gives.

The masks of 8, 64 and 256 ranks together are those of one process that holds everything, on meshes too: replicas must
not count twice, and a tensor that two mesh dimensions split is added up over both.
"""

from __future__ import annotations

import pytest
import torch
from thread_ranks import Group, at_once
from torch import Tensor

from rose_ds.config import RoseConfig
from rose_ds.core.layout import Block, Layout
from rose_ds.core.magnitudes import StepInputs
from rose_ds.core.select import Selection, select
from rose_ds.core.threshold import Exchange, local_only
from rose_ds.engines.torch.sharded import Composed
from rose_ds.masks import policy_of

SIZES = (5000, 17, 1, 1999)
"""Of the eligible tensors: most ranks hold nothing of the third."""


def numbers() -> dict[str, list[Tensor]]:
    """Gradients, moments and risks of whole tensors; ties among them."""
    draw = torch.Generator().manual_seed(5)
    made = {name: [torch.randn(n, generator=draw) for n in SIZES] for name in ("grads", "exp_avgs", "risks")}
    return {name: [t.mul(50).round().div(50) for t in tensors] for name, tensors in made.items()}


def piece(whole: int, part: int, parts: int) -> slice:
    """Shards as FSDP cuts them: the last ones may be shorter, or empty."""
    size = -(-whole // parts)
    return slice(min(whole, part * size), min(whole, (part + 1) * size))


def selection(
    pieces: list[slice], exchanges: list[Exchange], every: list[Exchange], rose: RoseConfig
) -> tuple[Selection, list[slice]]:
    """A rank's masks of its pieces of each tensor."""
    held = [i for i, at in enumerate(pieces) if at.stop > at.start]
    whole = numbers()
    cut = {name: [tensors[i][pieces[i]] for i in held] for name, tensors in whole.items()}
    layout = Layout(
        held, [exchanges[i] for i in held], every, len(SIZES), sum(SIZES), [f"t{i}" for i in range(len(SIZES))],
        [Block.flat(SIZES[i], pieces[i].start, pieces[i].stop - pieces[i].start) for i in held],
    )  # fmt: skip
    inputs = StepInputs(layout, cut["grads"], cut["exp_avgs"], cut["grads"], [0.9] * len(held), risk_grads=cut["risks"])
    policy = policy_of(rose)
    assert policy is not None
    return select(policy.selectors, rose.granularity, inputs), pieces


def check(found: list[tuple[Selection, list[slice]]], rose: RoseConfig) -> None:
    """Against the process that holds everything."""
    alone, _ = selection([slice(0, n) for n in SIZES], [local_only] * len(SIZES), [local_only], rose)
    for got, pieces in found:
        for bit, threshold in alone.thresholds.items():
            assert (got.thresholds[bit].value, got.thresholds[bit].kept) == (threshold.value, threshold.kept)
        held = [(i, at) for i, at in enumerate(pieces) if at.stop > at.start]
        assert len(got.codes) == len(held)
        for code, (i, at) in zip(got.codes, held, strict=True):
            want = alone.codes[i]
            assert torch.equal(code, want[at]) if isinstance(code, Tensor) else code == want  # type: ignore[index]


ROSE = [RoseConfig(granularity=g, keep_second=0.35) for g in ("element", "tensor")]
ROSE += [RoseConfig(keep_first="otsu", keep_second="knee")]


@pytest.mark.parametrize("rose", ROSE, ids=lambda rose: f"{rose.granularity}-{rose.keep_first}")
@pytest.mark.parametrize("world", [pytest.param(8, marks=pytest.mark.fast), 64, 256])
def test_sharded(world: int, rose: RoseConfig) -> None:
    """One group: FSDP, ZeRO."""
    group = Group(list(range(world)))

    def job(rank: int) -> tuple[Selection, list[slice]]:
        exchange = group.exchange_of(rank)
        return selection([piece(n, rank, world) for n in SIZES], [exchange] * len(SIZES), [exchange], rose)

    check(at_once(world, job), rose)


@pytest.mark.parametrize(("replicas", "shards"), [pytest.param(2, 4, marks=pytest.mark.fast), (8, 8), (32, 8)])
def test_replicated_and_sharded(replicas: int, shards: int) -> None:
    """HSDP: each replica counts by itself, over its own shards."""
    groups = [Group(list(range(r * shards, (r + 1) * shards))) for r in range(replicas)]

    def job(rank: int) -> tuple[Selection, list[slice]]:
        exchange = groups[rank // shards].exchange_of(rank)
        return selection([piece(n, rank % shards, shards) for n in SIZES], [exchange] * 4, [exchange], ROSE[0])

    check(at_once(replicas * shards, job), ROSE[0])


@pytest.mark.parametrize(("fsdp", "tensor_parallel"), [pytest.param(4, 2, marks=pytest.mark.fast), (8, 8), (32, 8)])
def test_split_over_two_mesh_dimensions(fsdp: int, tensor_parallel: int) -> None:
    """FSDP x tensor parallel: the first and the last tensor are split over both, the others over the first alone."""
    world = fsdp * tensor_parallel
    over_fsdp = [Group(list(range(t, world, tensor_parallel))) for t in range(tensor_parallel)]
    over_tp = [Group(list(range(f * tensor_parallel, (f + 1) * tensor_parallel))) for f in range(fsdp)]

    def job(rank: int) -> tuple[Selection, list[slice]]:
        f, t = divmod(rank, tensor_parallel)
        rows = over_fsdp[t].exchange_of(rank)
        both = Composed([rows, over_tp[f].exchange_of(rank)])
        pieces, exchanges = [], []
        for i, n in enumerate(SIZES):
            split = i in (0, 3)
            outer = piece(n, t, tensor_parallel) if split else slice(0, n)
            inner = piece(outer.stop - outer.start, f, fsdp)
            pieces.append(slice(outer.start + inner.start, outer.start + inner.stop))
            exchanges.append(both if split else rows)
        return selection(pieces, exchanges, [both, rows], ROSE[0])

    check(at_once(world, job), ROSE[0])
