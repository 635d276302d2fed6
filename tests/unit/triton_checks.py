"""Triton's kernels, interpreted, against core: run by test_triton.py in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from step_data import (
    GROUP,
    KINDS,
    SIZES,
    alike,
    batch_of,
    check_same_bits,
    codes_of,
    outcome,
    same,
    step_inputs,
    tensors,
)
from test_device import train
from tiny import Case
from torch import Tensor

from rose_ds import kernels
from rose_ds.config import RoseConfig
from rose_ds.core import threshold
from rose_ds.core.update import UpdateBatch
from rose_ds.kernels import triton_backend

CPU = torch.device("cpu")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """By kernel."""
    counted: Counter[str] = Counter()
    launch = triton_backend.TritonKernels.launch

    def spy(self: Any, kernel: Any, *arguments: Any, **constants: Any) -> None:
        counted[kernel.fn.__name__] += 1
        launch(self, kernel, *arguments, **constants)

    monkeypatch.setattr(triton_backend.TritonKernels, "launch", spy)
    return counted


@pytest.fixture(scope="module")
def compiled() -> Any:
    found = triton_backend.load(CPU)
    assert found is not None
    return found


def test_the_rounds_that_are_tried_are_cores() -> None:
    assert triton_backend._ROUNDS == threshold.ROUNDS


@pytest.mark.parametrize("where", ["risks", "update"])
def test_a_device_that_flushes_denormals(where: str, compiled: Any) -> None:
    """Found out before the first step, as some triton's division and square root do."""

    class Flushing(triton_backend.TritonKernels):
        def risks_on_device(self, **what: Any) -> Any:
            if where == "risks":  # 0 by what was flushed
                what["grads"] = [
                    g.where(m.abs() > 1e-38, math.nan) for g, m in zip(what["grads"], what["exp_avgs"], strict=True)
                ]
            return super().risks_on_device(**what)

        def adamw(self, params: Any, grads: Any, exp_avgs: Any, exp_avg_sqs: Any, *rest: Any) -> None:
            if where == "update":
                exp_avg_sqs = [v.where(v > 1e-38, 0.0) for v in exp_avg_sqs]
            super().adamw(params, grads, exp_avgs, exp_avg_sqs, *rest)

    with pytest.raises(RuntimeError, match="divides by denormal numbers"):
        triton_backend._try_out(Flushing(CPU, compiled.programs))


def with_kernels(compiled: Any, config: RoseConfig, inputs: Any) -> Any:
    return outcome(config, inputs, compiled, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "infinite", "nan"])
@pytest.mark.parametrize("sizes", SIZES[1:3], ids=str)
def test_select(kind: str, sizes: list[int], dtype: torch.dtype, compiled: Any, launches: Counter[str]) -> None:
    """Masks, thresholds, counts, histograms, skips and errors, of both orders and of each, in four launches."""
    plain = step_inputs(kind, sizes, dtype)
    shared = replace(step_inputs(kind, sizes, dtype, share=0.5), scale=torch.tensor(0.7), clip=0.3)
    for inputs, keep, settings in (
        (plain, 0.6, {}), (shared, 0.3, {"keep_largest": True}), (plain, 1e-9, {"strategy": "first"}),
        (shared, 0.4, {"strategy": "second"}), (plain, "auto", {}), (plain, 1.0, {"strategy": "second"}),
    ):  # fmt: skip
        config = RoseConfig(keep_first=keep, keep_second=keep, **settings)  # type: ignore[arg-type]
        launches.clear()
        want, found = outcome(config, inputs), with_kernels(compiled, config, inputs)
        assert alike(want, found), (keep, settings)
        assert launches == {"count_risks": 3, "mark_risks": 1}


@pytest.mark.parametrize("kind", ["normal", "equal"])
def test_slices_of_several_blocks(kind: str, compiled: Any) -> None:
    inputs, config = step_inputs(kind, SIZES[-1], torch.bfloat16), RoseConfig(keep_second=0.3)
    assert same(outcome(config, inputs), with_kernels(compiled, config, inputs))


def test_masks_of_other_scores_are_left_to_torch(compiled: Any, launches: Counter[str]) -> None:
    inputs = step_inputs("normal", [1000, 33], torch.float32)
    for config in (RoseConfig(strategy="random"), RoseConfig(strategy="gallop")):
        assert same(outcome(config, inputs), with_kernels(compiled, config, inputs))
    strided = replace(inputs, risk_grads=[torch.rand(2000)[::2], torch.rand(33)])
    assert same(outcome(RoseConfig(), strided), with_kernels(compiled, RoseConfig(), strided))
    assert not launches


def test_a_rank_that_holds_nothing(compiled: Any) -> None:
    risks = compiled.risks_on_device(
        grads=[], exp_avgs=[], risk_grads=[], alphas=[], scale=1.0, share=0.0, codes=[], first=1, second=2,
        largest=(False, False),
    )  # fmt: skip
    assert torch.equal(risks.histogram(torch.zeros(2).long(), 20, 12), torch.zeros(2, 1 << 12).long())
    risks.mark(torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "infinite", "nan"])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_update(kind: str, decay: float, dtype: torch.dtype, compiled: Any, launches: Counter[str]) -> None:
    """Parameters and moments of hard and soft masks, by element and by tensor, bit for bit, in one launch."""
    sizes = [40_001, 3, 257, 0, 1]
    group = {**GROUP, "weight_decay": decay}
    for step, table in itertools.product((1, 1000), ((0.0, 1.0, 1.0, 1.0), (0.0, 0.3, 0.7, 1.0))):
        codes, runs = codes_of(sizes, step, table), []
        for found in (None, compiled):
            held = tensors(kind, sizes, dtype)
            batch = batch_of(held, codes, group, step, table, kernels=found)
            launches.clear()
            batch.flush()
            assert launches == ({"masked_adamw": 1} if found else {})
            runs.append(held)
        check_same_bits(*runs, (step, table))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("rule", ["gradient", "update"])
def test_other_rules(rule: str, kind: str, dtype: torch.dtype, compiled: Any, launches: Counter[str]) -> None:
    """Masks of the gradient, by which it could be multiplied before; of the step, as core's. With factors."""
    sizes, table, scales = [40_001, 3, 257, 0, 1], (0.0, 1.0, 0.3, 1.0), [1.7, 1.0, 0.9, 1.0, 2.0]
    codes, runs = codes_of(sizes, 3, table), []
    for found in (False, True):
        held = tensors(kind, sizes, dtype)
        masked = rule == "gradient" and not found
        batch = UpdateBatch(GROUP, 5, table, "robust" if masked else rule, kernels=compiled if found else None)
        for i, code in enumerate(codes):
            views = [column[i] for column in held]
            if masked:
                values = torch.tensor(table)[code.int() if isinstance(code, Tensor) else code] * scales[i]
                batch = UpdateBatch(GROUP, 5, table, "robust", kernels=compiled)
                batch.add(3, (views[0], views[1].float() * values, *views[2:]))
                batch.flush()
            else:
                batch.add(code, tuple(views), scales[i])
        launches.clear()
        batch.flush()
        assert launches == ({"masked_adamw": 1} if found else {})
        runs.append([held[0], *held[2:]])
    check_same_bits(*runs, rule)


def test_places_change_nothing(compiled: Any) -> None:
    """Every element is computed alike wherever it lies, and whatever slices are cut of it."""
    whole = tensors("normal", [70_003], torch.float32)
    codes = torch.randint(0, 4, (70_003,), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    results = []
    for cuts in ([0, 70_003], [0, 1, 8, 40_005, 70_003]):
        held = [column[0].clone() for column in whole]
        batch = UpdateBatch(GROUP, 5, (0.0, 0.3, 0.7, 1.0), kernels=compiled)
        for start, stop in itertools.pairwise(cuts):
            batch.add(codes[start:stop], tuple(t[start:stop] for t in held))
        batch.flush()
        results.append(held)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("case", [Case(), Case(strategy="second", two_groups=True), Case(strategy="cautious")], ids=str)
def test_a_stepper(case: Case, launches: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice by the variable, and steps that torch takes no part in: its own reports, weights within rounding."""
    monkeypatch.setenv(kernels.VARIABLE, "torch")
    reports, weights, _ = train(case, None)
    assert not launches
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    theirs, their_weights, _ = train(case, None)
    # one launch to try each kernel out, where this process has not yet; then three steps
    assert launches["count_risks"] - 9 * (case.strategy != "cautious") in (0, 1)
    assert launches["masked_adamw"] - 3 * (1 + case.two_groups) in (0, 1)
    assert [r.scalars() for r in theirs] == [pytest.approx(r.scalars(), rel=1e-5) for r in reports]
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(weights, their_weights, strict=True))
