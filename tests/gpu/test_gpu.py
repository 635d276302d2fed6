"""What only a GPU can tell. The command, and where its figures go: conftest.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gpu_jobs as jobs
import pytest
import torch
from reference import check_parity, reference
from step_data import GROUP, KINDS, same, step_inputs, tensors
from tiny import Case
from torch_jobs import check_runs

from rose_ds import kernels
from rose_ds.config import RoseConfig
from rose_ds.core.magnitudes import StepInputs
from rose_ds.core.select import select
from rose_ds.core.update import UpdateBatch
from rose_ds.kernels import triton_backend
from rose_ds.masks import policy_of

pytestmark = pytest.mark.gpu
Figure = Callable[[str, Any], None]
CASES = [
    *(Case(accumulation=2, steps=3), Case("first", "tensor", steps=3), Case("second", two_groups=True, steps=3)),
    Case(first_order="halves", accumulation=2, steps=3),
    *(Case("cautious", steps=3), Case("gradient-mask", steps=3)),
]
ZERO_CASES = [replace(case, two_groups=False) for case in CASES]
WAYS = ("torch", "triton")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes a step; Triton is needed on a GPU, and left out of a rehearsal that does not interpret it."""
    if request.param == "triton" and device.type == "cpu" and not triton_backend.interpreted():
        pytest.skip("a rehearsal without TRITON_INTERPRET=1")
    monkeypatch.setenv(kernels.VARIABLE, request.param)
    return str(request.param)


# --- kernels against core on the CPU ---


def moved(inputs: StepInputs, device: torch.device) -> StepInputs:
    def there(held: Any) -> Any:
        return [t.to(device) for t in held]

    return replace(
        inputs, grads=there(inputs.grads), exp_avgs=there(inputs.exp_avgs), weights=there(inputs.weights),
        risk_grads=there(inputs.risk_grads),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_the_cpus(kind: str, dtype: torch.dtype, way: str, device: torch.device, figure: Figure) -> None:
    """Thresholds, counts and masks, bit for bit."""
    configs = RoseConfig(keep_second=0.35), RoseConfig(keep_largest=True), RoseConfig(strategy="cautious")
    for share, config in zip((0.0, 0.5, 0.0), configs, strict=True):
        inputs = step_inputs(kind, [70_001, 0, 3, 40_000], dtype, share=share)
        policy = policy_of(config)
        assert policy is not None
        want = select(policy.selectors, "element", inputs)
        there = moved(inputs, device)
        found = select(policy.selectors, "element", there, kernels.kernels_for(0, there.exp_avgs), device=device)
        found.codes = [code.cpu() for code in found.codes]  # type: ignore[union-attr]
        differing = sum(int((a != b).sum()) for a, b in zip(want.codes, found.codes, strict=True))  # type: ignore
        figure(f"codes that differ, {config.strategy}, share {share}", differing)
        assert same(want, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "infinite"])
@pytest.mark.parametrize("rule", ["robust", "gradient", "update"])
def test_updates_are_the_cpus(
    rule: str, kind: str, dtype: torch.dtype, way: str, device: torch.device, figure: Figure
) -> None:
    """Bit for bit by Triton, but for a mask of the gradient, which torch's loop over tensors takes on CPUs; torch's
    operations on a GPU may fuse otherwise, so that a last bit differs.
    """
    sizes, runs = [70_001, 3, 257, 0, 1], []
    factors = [1.0] * 5 if rule == "robust" else [1.7, 1.0, 0.9, 1.0, 2.0]
    draw = torch.Generator().manual_seed(1)
    codes = [torch.randint(0, 4, (n,), generator=draw, dtype=torch.uint8) for n in sizes]
    for where in (torch.device("cpu"), device):
        held = [[t.to(where) for t in column] for column in tensors(kind, sizes, dtype)]
        found = kernels.kernels_for(0, held[0]) if where == device else None
        there = [code.to(where) for code in codes]
        batch = UpdateBatch(GROUP, 7, (0.0, 0.3, 0.7, 1.0), rule, kernels=found)
        for i, code in enumerate(there):
            batch.add(code, tuple(column[i] for column in held), factors[i])
        batch.flush()
        runs.append([torch.cat(column).cpu() for column in held])
    for name, ours, theirs in zip(("parameters", "gradients", "exp_avg", "exp_avg_sq"), *runs, strict=True):
        a, b = ours.nan_to_num(7.0), theirs.nan_to_num(7.0)
        figure(f"{name} that differ", int((a != b).sum()))
        close = torch.isclose(a, b, rtol=1e-5, atol=1e-7).double().mean()  # but where a sum cancels
        assert torch.equal(a, b) if way == "triton" and rule != "gradient" else close > 0.999, name


# --- engines against the twin ---


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("engine", ["plain", "ddp", "fsdp2", "zero2", "zero2-overlap", "zero3", "zero3-offload"])
def test_parity(
    engine: str, world: int, way: str, device: torch.device, figure: Figure, request: pytest.FixtureRequest
) -> None:
    """Invariant 1 over NCCL: parameters, thresholds and counts of the single-process twin, on the CPU."""
    if engine == "plain" and world > 1:
        pytest.skip("one process")
    if device.type == "cuda" and torch.cuda.device_count() < world:
        pytest.skip(f"{torch.cuda.device_count()} GPU")
    if way == "triton" and engine.endswith("offload"):
        pytest.skip("the optimizer's tensors are on the CPU, which these kernels do not read")
    if device.type == "cpu" and engine.startswith("zero"):
        request.getfixturevalue("extensions")
    cases = ZERO_CASES if engine.startswith("zero") else CASES
    found = jobs.on_ranks(device, world, jobs.engines, engine, cases)
    for i, case in enumerate(cases):
        runs, log = [ranks[i] for ranks in found], list[str]()
        figure(str(case), str(check_parity(runs[0].parameters, reference(case))))
        check_runs(runs, case, engine, log)


def test_thresholds_when_every_launch_is_waited_for(way: str, device: torch.device) -> None:
    """A missing wait between streams would show as another threshold."""
    case = Case(steps=5)
    default, blocking = (jobs.on_ranks(device, 1, jobs.taus, case, CUDA_LAUNCH_BLOCKING=value)[0] for value in "01")
    assert [report.scalars() for report in default] == [report.scalars() for report in blocking]


# --- what a step costs ---

LARGE = Case(hidden=1 << 12, depth=8, clip=0.5)


@pytest.mark.parametrize("strategy", ["none", "first", "second", "ensemble"])
def test_waits(strategy: str, way: str, device: torch.device, figure: Figure) -> None:
    """A step reads the gradient's norm, and once what the masks came to."""
    case = Case(strategy, depth=8)
    model = jobs.ordinary(case, device)
    stepper = jobs.stepper_of(model, case)
    with jobs.counting_waits(device) as counted:
        torch.ones(1, device=device).item()
    assert len(counted) == (device.type == "cuda"), "the count itself"
    for step in (1, 2, 3):
        jobs.backward(stepper, model, jobs.batch_of(case, step, device))
        with jobs.counting_waits(device) as counted:
            stepper.step()
    figure("waits", len(counted))
    assert len(counted) <= (1 if strategy == "none" else 2), counted


def test_memory(way: str, device: torch.device, figure: Figure) -> None:
    """Over what lies there before: a step takes codes, kept scores and a bounded scratch memory."""
    case = replace(LARGE, hidden=1 << 16 if device.type == "cuda" else 64)
    model = jobs.ordinary(case, device)
    stepper = jobs.stepper_of(model, case)
    batch, peaks = jobs.batch_of(case, 1, device), {}
    for _ in range(2):
        peaks = {
            "backward": jobs.peak_of(device, lambda: jobs.backward(stepper, model, batch)),
            "step": jobs.peak_of(device, stepper.step),
        }
    eligible = stepper.engine.layout.element_count
    figure("eligible elements", eligible)
    figure("peak bytes", peaks)
    assert peaks["step"] <= 12 * eligible + 2**28


def test_time(device: torch.device, figure: Figure, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bound, as machines differ: the figures are for docs/performance.md. Each way is warmed up, and in turns."""
    cuda = device.type == "cuda"
    case = replace(LARGE, hidden=1 << 18 if cuda else 64)
    medians: dict[str, float] = {}
    for way in ("torch", *(["triton"] if cuda or triton_backend.interpreted() else [])):
        monkeypatch.setenv(kernels.VARIABLE, way)
        for strategy in ("none", "first", "second", "ensemble", "cautious"):
            one = replace(case, strategy=strategy)
            model = jobs.ordinary(one, device)
            stepper, seconds = jobs.stepper_of(model, one), []
            for step in range(1, 13 if cuda else 3):
                jobs.backward(stepper, model, jobs.batch_of(one, step, device))
                seconds.append(jobs.seconds_of(device, stepper.step))
            medians[f"{way}, {strategy}"] = round(1000 * statistics.median(seconds[1:]), 3)
    figure("eligible elements", stepper.engine.layout.element_count)
    figure("milliseconds of a step()", medians)
    assert all(value > 0 for value in medians.values())


# --- runs that were feared for ---


def test_bf16_at_batch_1(device: torch.device, figure: Figure) -> None:
    """Two passes of one row are equal now and then, in bf16: no reason to stop."""
    case = Case(dropout=0.1)
    steps = 1000 if device.type == "cuda" else 30
    torch.manual_seed(3)
    model = jobs.ordinary(case, device)
    stepper, losses, equal = jobs.stepper_of(model, case), [], 0

    def forward(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model(ids)

    for step in range(1, steps + 1):
        values = jobs.backward(stepper, forward, jobs.batch_of(case, step, device, 1))
        equal += int(values["kl"] == 0)
        losses.append(float(values["loss"]))
        report = stepper.step()
        assert not report.skipped
    figure("steps", steps)
    figure("steps of equal passes", equal)
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("warmup", [0, 2])
def test_compiled(warmup: int, device: torch.device) -> None:
    """A compiled model, whose first compiled backward is the task's alone during a warm-up, against the same model."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    case, runs = Case(mask_warmup_steps=warmup, steps=4), []
    for compiled in (False, True):
        model: Any = jobs.ordinary(case, device)
        if compiled:
            model = torch.compile(model, backend="inductor" if device.type == "cuda" else "aot_eager")
        stepper, reports = jobs.stepper_of(model, case), []
        torch.manual_seed(5)
        for step in range(1, case.steps + 1):
            with inductor.patch(fallback_random=True):  # dropout draws what it would draw uncompiled
                jobs.backward(stepper, model, jobs.batch_of(case, step, device))
            reports.append(stepper.step())
        runs.append(reports)
    for plain, other in zip(*runs, strict=True):
        assert other.scalars() == pytest.approx(plain.scalars(), rel=2e-2)
    assert [r.tau_first is not None for r in runs[1]] == [step > warmup for step in range(1, 5)]
