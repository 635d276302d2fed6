"""A step on an accelerator: what the CPU finds, bit for bit, with one read on the host, however many the slices."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerator import DEVICE, Accelerator, pretend, values_of
from step_data import GROUP, KINDS, SIZES, alike, batch_of, outcome, same, step_inputs, tensors
from test_large_worlds import SIZES as WHOLE
from test_large_worlds import numbers, piece
from thread_ranks import Group, at_once
from tiny import Case, make_model, micro_batch, parameter_groups, rows
from torch import Tensor
from torch.nn.functional import cross_entropy

from rose_ds import RoseAdamW, prepare
from rose_ds.config import RoseConfig
from rose_ds.core.counted import bits_of
from rose_ds.core.device import kth_smallest_on_device
from rose_ds.core.layout import Block, Layout
from rose_ds.core.magnitudes import StepInputs
from rose_ds.core.mask import FIRST, SECOND
from rose_ds.core.select import Selection, select
from rose_ds.core.threshold import Wanted, kth_smallest, local_only
from rose_ds.masks import policy_of

# --- what the count is worth ---


@pytest.mark.fast
def test_the_pretended_device_counts() -> None:
    """Each way in which core once read numbers from the device."""
    ways: list[Any] = [
        lambda x: int(x[0]), lambda x: x.tolist(), lambda x: x[x > 1], torch.bincount, lambda x: bool(x.any()),
        lambda x: torch.equal(x, x), lambda x: x.cpu(), lambda x: torch.ones(2).to(DEVICE), torch.nonzero,
        lambda x: torch.tensor([1.0], device=DEVICE), lambda x: x.copy_(torch.zeros(3)), lambda x: x.unique(),
    ]  # fmt: skip
    for i, way in enumerate(ways):
        with Accelerator() as device:
            x = pretend(torch.tensor([2, 0, 1]))
            (x * 2 + torch.full((), 3, device=DEVICE)).cumsum(0)[1:].gather(0, x[1:])
            assert not device.waits
            way(x)
        assert sum(device.waits.values()) == 1, i
    with Accelerator(), pytest.raises(RuntimeError, match="two devices"):
        pretend(torch.ones(2)) + torch.ones(2)


# --- thresholds and masks ---


def there(inputs: StepInputs) -> StepInputs:
    """The same inputs on the accelerator."""
    scale = inputs.scale
    return replace(
        inputs,
        grads=list(map(pretend, inputs.grads)),
        exp_avgs=list(map(pretend, inputs.exp_avgs)),
        weights=list(map(pretend, inputs.weights)),
        risk_grads=None if inputs.risk_grads is None else list(map(pretend, inputs.risk_grads)),
        scale=pretend(scale) if isinstance(scale, Tensor) else scale,
    )


def on_device(config: RoseConfig, inputs: StepInputs, **options: Any) -> tuple[Any, Accelerator]:
    """The selection, its codes back on the CPU; or the error's message."""
    with Accelerator() as device:
        found = outcome(config, there(inputs), device=DEVICE, **options)
    if not isinstance(found, str):
        found.codes = [values_of(code) for code in found.codes]  # type: ignore[arg-type]
    return found, device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_select(kind: str, sizes: list[int], dtype: torch.dtype) -> None:
    """Masks, thresholds, counts, histograms; one read, and one more where a criterion looks at the histogram."""
    plain = step_inputs(kind, sizes, dtype)
    shared = replace(step_inputs(kind, sizes, dtype, share=0.5), scale=torch.tensor(0.7))
    for inputs, keep, largest in (
        (plain, 0.6, False), (shared, 0.3, True), (plain, 1e-9, False), (plain, 1.0, False), (shared, "auto", False),
        (plain, "knee", True), (shared, 0.6, False),
    ):  # fmt: skip
        config = RoseConfig(keep_first=keep, keep_second=keep, keep_largest=largest)  # type: ignore[arg-type]
        found, device = on_device(config, inputs)
        assert same(outcome(config, inputs), found), (keep, largest)
        assert sum(device.waits.values()) == (2 if isinstance(keep, str) else 1), device.waits


@pytest.mark.fast
@pytest.mark.parametrize("strategy", ["first", "second", "ensemble", "random", "gradient-mask", "gallop", "cautious"])
def test_every_mask_of_elements(strategy: Any) -> None:
    inputs = step_inputs("normal", [1000, 33, 257, 1], torch.float32)
    found, device = on_device(RoseConfig(strategy=strategy), inputs)
    assert same(outcome(RoseConfig(strategy=strategy), inputs), found)
    assert len(found.codes) == 4
    assert device.waits == {"aten::_to_copy": 1}


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["infinite", "nan"])
@pytest.mark.parametrize("strategy", ["first", "second", "ensemble"])
def test_not_finite(kind: str, strategy: Any) -> None:
    """Steps are skipped, and errors raised, alike."""
    inputs, config = step_inputs(kind, [1000, 33, 257, 1], torch.float32), RoseConfig(strategy=strategy)
    want, (found, device) = outcome(config, inputs), on_device(config, inputs)
    assert device.waits == {"aten::_to_copy": 1}
    assert alike(want, found)
    assert isinstance(want, str) or want.finite is False or kind == "infinite"


class Values:
    """One ranking of some values."""

    def __init__(self, values: Tensor) -> None:
        self.bits = bits_of(values)

    def histogram(self, prefixes: Tensor, shift: int, width: int) -> Tensor:
        bits = self.bits.long() & 0xFFFFFFFF
        inside = bits[(bits >> (shift + width)) == prefixes[0]]
        return torch.bincount((inside >> shift) & ((1 << width) - 1), minlength=1 << width)[None]

    def mark(self, taus: Tensor) -> None:
        raise NotImplementedError("only counted")


@pytest.mark.fast
@pytest.mark.parametrize("largest", [False, True])
def test_errors_are_those_of_the_host(largest: bool) -> None:
    """Negative values, k out of range: raised by the read, in the same words."""
    cpu = torch.device("cpu")
    for data, k in (([1.0, -2.0, 3.0], 2), ([1.0, 2.0], 3), ([1.0, 2.0], 0), ([], 1)):
        values = torch.tensor(data)
        with pytest.raises(ValueError) as wanted:
            kth_smallest([([values], local_only)], k, largest=largest)
        _, found = kth_smallest_on_device([(Values(values), local_only)], [Wanted(k, largest)], cpu)
        with pytest.raises(ValueError) as error:
            next(found)
        assert str(error.value) == str(wanted.value)


@pytest.mark.parametrize("summed", [False, True], ids=["gathered", "summed"])
@pytest.mark.parametrize("world", [2, 8])
def test_several_ranks(world: int, summed: bool) -> None:
    """Shards that are uneven or missing: every rank the same thresholds, its own masks, and counts by rank."""
    whole, config = numbers(), RoseConfig(keep_second=0.35)

    def inputs_of(rank: int, group: Group) -> StepInputs:
        pieces = [piece(n, rank, world) for n in WHOLE]
        held = [i for i, at in enumerate(pieces) if at.stop > at.start]
        cut = {name: [tensors[i][pieces[i]] for i in held] for name, tensors in whole.items()}
        exchange = group.exchange_of(rank)
        layout = Layout(
            held, [exchange] * len(held), [exchange], len(WHOLE), sum(WHOLE), [f"t{i}" for i in range(len(WHOLE))],
            [Block.flat(WHOLE[i], pieces[i].start, pieces[i].stop - pieces[i].start) for i in held],
        )  # fmt: skip
        return StepInputs(
            layout, cut["grads"], cut["exp_avgs"], cut["grads"], [0.9] * len(held), risk_grads=cut["risks"]
        )

    groups = [Group(list(range(world)), summed=summed) for _ in range(2)]

    def there_too(rank: int) -> tuple[Any, Accelerator]:
        def on_host(local: Tensor) -> Tensor:
            return pretend(there_exchange(values_of(local)))

        inputs = inputs_of(rank, groups[1])
        there_exchange = inputs.layout.exchanges[0]
        layout = replace(inputs.layout, exchanges=[on_host], exchange_of=[on_host] * len(inputs.grads))
        return on_device(config, replace(inputs, layout=layout))

    wanted: list[Selection] = at_once(world, lambda rank: outcome(config, inputs_of(rank, groups[0])))
    for want, (found, device) in zip(wanted, at_once(world, there_too), strict=True):
        assert same(want, found)
        assert (want.thresholds[FIRST].kept_per_rank is None) == summed
        assert device.waits == {"aten::_to_copy": 1}


def test_the_page_tells_what_is_counted() -> None:
    """docs/performance.md has a table of waits, by the way of CPUs and by that of accelerators."""
    policy, counted = policy_of(RoseConfig()), {}
    assert policy is not None
    for way in (None, DEVICE):
        for slices in (10, 192):
            inputs = replace(step_inputs("normal", [64] * slices, torch.float32), beta1s=[0.9] * slices)
            with Accelerator() as device:
                select(policy.selectors, "element", there(inputs), device=way)
            counted[way, slices] = sum(device.waits.values())
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    assert f"| as on CPUs | {counted[None, 10]:,} | {counted[None, 192]:,} |\n" in page
    assert f"| on an accelerator | {counted[DEVICE, 10]} | {counted[DEVICE, 192]} |\n" in page


# --- the update ---


@pytest.mark.parametrize("slices", [3, 40])
def test_a_whole_step_reads_once(slices: int) -> None:
    """Masks and update of one step, by element, whatever the number of slices: weights and moments bit for bit."""
    sizes = [257, 1, 64, 0, 33] * (slices // 3)
    inputs, config = step_inputs("normal", sizes, torch.float32), RoseConfig(keep_second=0.35)
    inputs = replace(inputs, beta1s=[0.9] * len(sizes))
    group, runs = {**GROUP, "fused": True}, []
    for accelerated in (False, True):
        held = tensors("normal", sizes, torch.float32)
        with Accelerator() as device:
            if accelerated:
                held = [list(map(pretend, column)) for column in held]
            one = replace(inputs, grads=held[1], exp_avgs=held[2], weights=held[0])
            one = replace(there(one), grads=held[1], exp_avgs=held[2], weights=held[0]) if accelerated else one
            policy = policy_of(config)
            assert policy is not None
            found = select(policy.selectors, "element", one, device=DEVICE if accelerated else None)
            batch = batch_of(held, list(found.codes), group, 5, policy.values)
            batch.add(3, tuple(pretend(t) if accelerated else t for t in map(torch.ones, [9] * 4)))
            batch.flush()
        assert sum(device.waits.values()) == accelerated, device.waits
        assert accelerated == (device.calls > 100)
        runs.append([values_of(t) for t in itertools.chain(*held)])
    assert {SECOND, FIRST} == set(found.thresholds)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# --- the whole step ---


def train(case: Case, device: Accelerator | None) -> tuple[list[Any], list[Tensor], list[dict[str, int]]]:
    """Three steps of a Stepper: reports, parameters, and what waited in each ``step()``."""
    model = make_model(case)
    ids_labels = [micro_batch(case, t, 0) for t in (1, 2, 3)]
    if device is not None:
        for name, param in list(model.named_parameters()):
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, torch.nn.Parameter(pretend(param.detach())))
        ids_labels = [(pretend(ids), pretend(labels)) for ids, labels in ids_labels]
    optimizer = RoseAdamW(parameter_groups(case, model, named=True), fused=True, **case.rose)
    stepper = prepare(model, optimizer, max_grad_norm=case.clip)
    reports, waits = [], []
    torch.manual_seed(1234)
    for ids, labels in ids_labels:
        with rows(len(ids), slice(0, len(ids))):
            stepper.backward(partial(model, ids), partial(cross_entropy, target=labels))
        if device is not None:
            device.waits.clear()
        reports.append(stepper.step())
        waits.append(dict(device.waits) if device is not None else {})
    return reports, [values_of(p.detach()) for p in model.parameters()], waits


@pytest.mark.fast
@pytest.mark.parametrize("strategy", ["none", "first", "second", "ensemble"])
def test_a_stepper_reads_the_norm_and_the_masks(strategy: str) -> None:
    """Two reads a step, whatever is ranked; without a mask one."""
    case = Case(strategy=strategy)
    reports, weights, _ = train(case, None)
    with Accelerator() as device:
        theirs, there_weights, waits = train(case, device)
    norm, masks = {"aten::_local_scalar_dense": 1}, {"aten::_to_copy": 1}
    assert waits == [norm if strategy == "none" else norm | masks] * 3
    for ours, other in zip(reports, theirs, strict=True):
        assert (ours.kept_first, ours.kept_second) == (other.kept_first, other.kept_second)
        assert ours.scalars() == pytest.approx(other.scalars(), rel=1e-5)
    # the passes round otherwise: what is a layer to autograd is its parts to a device of another type
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(weights, there_weights, strict=True))
