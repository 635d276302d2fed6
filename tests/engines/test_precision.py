"""fp16 with its loss scale, and the bf16 paths of torch's own engines: fp32 risks, masters and moments."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_jobs
from plain_jobs import build
from reference import Run, reference, train
from spawn import run_ranks
from tiny import Case, make_model, micro_batch, rows
from torch import Tensor
from zero_jobs import Job, believe_in_fp16, check_ranks_agree, fp16, run_all, runs_of, start

from rose_ds.errors import RefusedConfiguration

STAGES = (0, 1, 2, 3)
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SCALE = 2.0**12


# --- fp16: parity ---

CASES = [Case("first", accumulation=2), Case("ensemble", "tensor"), Case(accumulation=2, two_groups=True), Case("none")]
PARITY = [
    *(Job(case, stage, {}, fp16(), "fp16") for stage in STAGES for case in CASES),
    *(Job(CASES[2], stage, OFFLOAD, fp16(), "fp16-offload") for stage in (1, 2, 3)),
]

# --- steps that overflow ---

SCHEDULE = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.03, "warmup_num_steps": 6}}}
BF16 = {"bf16": {"enabled": True}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
ENSEMBLE, TENSOR = Case(accumulation=2), Case(granularity="tensor", accumulation=2)
HALF = [
    *(Job(ENSEMBLE, stage, {}, fp16() | SCHEDULE, "fp16") for stage in STAGES),
    *(Job(ENSEMBLE, stage, OFFLOAD, fp16() | SCHEDULE, "fp16-offload") for stage in (1, 2, 3)),
    Job(TENSOR, 2, {}, fp16() | SCHEDULE, "fp16"),
]
#: no loss scale: only NaN and inf themselves, and the same bookkeeping
UNSCALED = [
    *(Job(ENSEMBLE, stage, {}, SCHEDULE, "fp32") for stage in STAGES),
    *(Job(ENSEMBLE, stage, {}, BF16 | SCHEDULE, "bf16") for stage in STAGES),
    Job(ENSEMBLE, 1, {}, BF16 | FP32_SUMS | SCHEDULE, "bf16-fp32-sums"),
]
OVERFLOWS = [
    *((job, what) for job in HALF for what in ("loss", "kl", "loss-nan", "kl-nan")),
    *((job, what) for job in UNSCALED for what in ("loss-nan", "kl-nan")),
]
STEPS, BROKEN = (1, 2, 3, 4), 2


@dataclass
class Trace:
    """What a run left after each step: weights and moments, and what DeepSpeed counts."""

    reports: list[Any] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)
    counters: list[tuple[float, int, float]] = field(default_factory=list)
    """Loss scale, DeepSpeed's skipped steps, learning rate."""
    left_apart: list[bool] = field(default_factory=list)


def overflow(rank: int, world: int, job: Job, what: str) -> Trace:
    """Four steps of two micro-batches. Step 2 is broken in its first micro-batch, on the last rank: ``what`` is too
    large for fp16, or NaN. "without": step 2 is left out and the scale halved instead."""
    case = job.case
    engine, stepper = start(job, world)
    trace = Trace()
    for t in STEPS:
        if what == "without" and t == BROKEN:
            if job in HALF:
                engine.optimizer.loss_scale = SCALE / 2
            continue
        for micro in range(case.accumulation):
            ids, labels = micro_batch(case, t, micro)
            share = len(ids) // world
            mine = slice(rank * share, (rank + 1) * share)
            broken = what if t == BROKEN and micro == 0 and rank == world - 1 else ""
            factor = float("nan") if "nan" in broken else 1e4
            torch.manual_seed(100 * t + micro)
            passes = itertools.count(1)

            def forward(
                ids: Tensor = ids[mine], broken: str = broken, by: float = factor, passes: Any = passes
            ) -> Tensor:
                logits = engine(ids)
                return logits * by if next(passes) == 2 and broken.startswith("kl") else logits

            def loss(z: Tensor, y: Tensor = labels[mine], broken: str = broken, by: float = factor) -> Tensor:
                value = F.cross_entropy(z.float(), y)
                return value * by if broken.startswith("loss") else value

            with rows(len(ids), mine):
                stepper.backward(forward, loss)
                report = stepper.step()
        trace.reports.append(report)
        moments = {
            f"{i}/{name}": value.detach().clone()
            for i, state in enumerate(stepper.optimizer.state.values())
            for name, value in state.items()
        }
        trace.states.append({**stepper.gather_parameters(), **moments})
        lr = engine.get_lr()[0]
        trace.counters.append((stepper.engine.loss_scale, int(engine.skipped_steps), lr))
        trace.left_apart.append(stepper.engine.take_risk_grads() is not None)
    engine.destroy()
    return trace


# --- what masks are made from ---


@dataclass
class Seen:
    """One step's selection on this rank."""

    codes: Tensor
    grads: list[Tensor]
    """The task gradient as the selection took it."""
    updated_with: dict[int, Tensor] = field(default_factory=dict)
    """The same as the optimizer then took it, by slice."""


@contextmanager
def watching(stepper: Any) -> Iterator[list[Seen]]:
    """Selections, and the gradients of the updates that follow; everything but an arriving gradient is fp32."""
    import rose_ds.training.masking

    original, steps = rose_ds.training.masking.select, []

    def recording(selectors: Any, granularity: str, inputs: Any, *kernels: Any, **how: Any) -> Any:
        grads = [g.float() * inputs.scale for g in inputs.grads]
        assert all(g.dtype == torch.float32 for g in (*inputs.risk_grads, *inputs.exp_avgs, *inputs.weights))
        selection = original(selectors, granularity, inputs, *kernels, **how)
        codes = torch.cat([torch.as_tensor(code).flatten() for code in selection.codes])
        steps.append(Seen(codes, grads))
        return selection

    def before_update(optimizer: Any, *_: Any) -> None:
        held = {p for group in optimizer.param_groups for p in group["params"]}
        for i, piece in enumerate(stepper.engine.slices):
            if piece.param in held and piece.param.grad is not None and steps:
                steps[-1].updated_with[i] = piece.grad().clone()

    rose_ds.training.masking.select = recording
    hook = stepper.optimizer.register_step_pre_hook(before_update)
    try:
        yield steps
    finally:
        rose_ds.training.masking.select = original
        hook.remove()


#: fp32; a scale of 1 and of 2**16; and one that grows with every step
SCALES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16-1": fp16(loss_scale=1),
    "fp16-65536": fp16(loss_scale=2**16),
    "fp16-growing": fp16(loss_scale_window=1),
    "bf16": BF16,
}


def watched(rank: int, world: int, stage: int, scale: str, zero: dict[str, Any]) -> tuple[list[Seen], Run, float]:
    """Three steps, what was seen in them, and the loss scale after them."""
    job = Job(Case(steps=3, two_groups=True), stage, zero, SCALES[scale])
    engine, stepper = start(job, world)
    with watching(stepper) as steps:
        run = train(stepper, engine, job.case, rank, world, reseed=True)
    assert len(steps) == 3
    after = stepper.engine.loss_scale
    engine.destroy()
    return steps, run, after


WATCHED = [
    *((stage, scale, {}) for stage in STAGES for scale in SCALES),
    *((stage, scale, OFFLOAD) for stage in (1, 2, 3) for scale in ("fp16-growing", "bf16")),
]


def watched_name(stage: int, scale: str, zero: dict[str, Any]) -> str:
    return f"zero{stage}-{scale}{'-offload' if zero else ''}"


def zero_ranks(rank: int, world: int) -> dict[str, Any]:
    """Everything under DeepSpeed."""
    believe_in_fp16()
    results: dict[str, Any] = {"parity": run_all(rank, world, PARITY)}
    for job, what in OVERFLOWS + [(job, "without") for job in HALF + UNSCALED]:
        results[f"{job}-{what}"] = overflow(rank, world, job, what)
    for which in WATCHED:
        results[watched_name(*which)] = watched(rank, world, *which)
    return results


@pytest.fixture(scope="module")
def under_zero(extensions: object) -> Callable[[], list[dict[str, Any]]]:
    """The above on two ranks, in one spawn; remembered, a failure too."""
    of = torch_jobs.once(lambda world: run_ranks(zero_ranks, world, timeout=400))
    return lambda: of(2)


@pytest.mark.parametrize("job", PARITY, ids=str)
def test_fp16(job: Job, under_zero: Any) -> None:
    """Reports agree on all ranks and, like the masters, stay close to an fp32 run, whatever the loss scale."""
    runs, twin = runs_of([result["parity"] for result in under_zero()], job), reference(job.case)
    check_ranks_agree(runs)
    for report, want in zip(runs[0].reports, twin.steps, strict=True):
        assert report.grad_norm == pytest.approx(want.grad_norm, rel=0.01) and not report.skipped
        if "first" in want.tau:
            assert report.tau_first == pytest.approx(want.tau["first"], rel=0.02)
    got = torch.cat([runs[0].parameters[name].flatten() for name in twin.parameters])
    want_all = torch.cat([p.flatten() for p in twin.parameters.values()])
    assert (got - want_all).norm() / want_all.norm() < 0.01
    assert not torch.equal(got, got.half().float()), "gather_parameters() gives the fp32 masters"


@pytest.mark.parametrize(("job", "what"), OVERFLOWS, ids=lambda value: str(value))
def test_overflow_on_one_rank(job: Job, what: str, under_zero: Any) -> None:
    """Whichever gradient is not finite: both ranks skip, nothing changes, DeepSpeed counts one skipped step, lowers its
    loss scale once and leaves its lr scheduler, and what follows is as if that batch had not been."""
    results = under_zero()
    for result in results:
        trace, without = result[f"{job}-{what}"], result[f"{job}-without"]
        assert [report.skipped for report in trace.reports] == [False, True, False, False]
        assert [report.step for report in trace.reports] == [1, 1, 2, 3]
        assert not any(trace.left_apart), "the KL gradient is dropped with its step"
        for name, value in trace.states[0].items():
            assert torch.equal(value, trace.states[1][name]), name
        before, after = (SCALE, SCALE / 2) if job in HALF else (1.0, 1.0)
        assert [scale for scale, _, _ in trace.counters] == [before, after, after, after]
        assert [skipped for _, skipped, _ in trace.counters] == [0, 1, 1, 1]
        rates = [lr for *_, lr in trace.counters]
        assert rates[0] == rates[1] and rates[2:] == [lr for *_, lr in without.counters][1:]
        assert trace.reports[2:] == without.reports[1:]
        for ours, theirs in zip(trace.states[2:], without.states[1:], strict=True):
            assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    ours, theirs = (str(result[f"{job}-{what}"].reports) for result in results)  # text: a skipped step's tau is NaN
    assert ours == theirs


@pytest.mark.parametrize("which", WATCHED, ids=lambda which: watched_name(*which))
def test_masks_and_update_see_one_gradient(which: Any, under_zero: Any) -> None:
    """Eq. 4 compares the gradient that the update uses, to the bit: unscaled, clipped, with the scale that DeepSpeed
    unscales with."""
    for result in under_zero():
        steps, run, scale = result[watched_name(*which)]
        assert scale == {"fp16-1": 1, "fp16-65536": 2**16, "fp16-growing": SCALE * 4}.get(which[1], 1)
        for step in steps:
            assert step.updated_with.keys() == set(range(len(step.grads)))
            for i, grad in enumerate(step.grads):
                assert torch.equal(grad, step.updated_with[i])
        assert not any(report.skipped for report in run.reports)


@pytest.mark.parametrize("stage", STAGES)
def test_masks_do_not_depend_on_the_loss_scale(stage: int, under_zero: Any) -> None:
    """A scale of 1 and of 65536 give the same masks but for what fp16 loses to underflow, and nearly fp32's."""
    small, large, single = (
        torch.cat([result[f"zero{stage}-{scale}"][0][1].codes for result in under_zero()])
        for scale in ("fp16-1", "fp16-65536", "fp32")
    )
    assert (small != large).float().mean() <= 0.01
    assert 0 < (large != single).float().mean() < 0.05


# --- bf16 without DeepSpeed: FSDP's mixed precision, and autocast ---

FEW = [Case(accumulation=2), Case("first", "tensor"), Case("none")]
SHARDED = ["fsdp2-all-bf16", "fsdp1-bf16-orig", "fsdp1-bf16-flat", "fsdp1-all-bf16-orig", "fsdp1-all-bf16-flat"]
AUTOCAST = ["plain", "ddp"]


def in_bf16(rank: int, world: int, how: str, case: Case) -> Run:
    """A case in bf16; what the optimizer holds, and what masks are made from, is fp32."""
    if how == "plain":
        model, stepper = build(case)
        rank, world = 0, 1
    else:
        model, stepper = torch_jobs.start(torch_jobs.Job(case, how))

    def forward(ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=how in AUTOCAST):
            return model(ids)

    with watching(stepper) as steps:
        run = train(stepper, forward, case, rank, world)
    assert bool(steps) == (case.strategy != "none")
    held = [p for group in stepper.optimizer.param_groups for p in group["params"]]
    states = [value for state in stepper.optimizer.state.values() for value in state.values()]
    assert all(t.dtype == torch.float32 for t in (*held, *states))
    return run


def torch_ranks(rank: int, world: int) -> dict[str, Any]:
    """Everything under torch's own engines."""
    results: dict[str, Any] = {f"{how}-{case}": in_bf16(rank, world, how, case) for how in SHARDED for case in FEW}
    results.update({f"ddp-{case}": in_bf16(rank, world, "ddp", case) for case in FEW})
    results["risks"] = torch_jobs.risks_of_all(rank, world, SHARDED)
    half = torch_jobs.fsdp2(make_model(FEW[0]).bfloat16())
    results["refused"] = torch_jobs.message_of(lambda: torch_jobs.prepare(half))
    return results


@pytest.fixture(scope="module")
def under_torch() -> Callable[[], list[dict[str, Any]]]:
    """The above on two ranks, in one spawn; remembered, a failure too."""
    of = torch_jobs.once(lambda world: run_ranks(torch_ranks, world))
    return lambda: of(2)


def check_near_fp32(run: Run, case: Case) -> None:
    twin = reference(case)
    got = torch.cat([run.parameters[name].flatten() for name in twin.parameters])
    want = torch.cat([p.flatten() for p in twin.parameters.values()])
    assert 1e-5 < (got - want).norm() / want.norm() < 0.02
    for report, step in zip(run.reports, twin.steps, strict=True):
        assert report.grad_norm == pytest.approx(step.grad_norm, rel=0.05)
        assert (report.tau_first is None) == ("first" not in step.tau)


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("how", [*SHARDED, "ddp"])
def test_bf16(how: str, case: Case, under_torch: Any) -> None:
    """bf16 passes, reduced in fp32 or bf16: the ranks agree, and stay near an fp32 run."""
    runs = [result[f"{how}-{case}"] for result in under_torch()]
    check_ranks_agree(runs)
    check_near_fp32(runs[0], case)


@pytest.mark.fast
@pytest.mark.parametrize("case", FEW, ids=str)
def test_autocast_in_one_process(case: Case) -> None:
    """The same under autocast alone."""
    check_near_fp32(in_bf16(0, 1, "plain", case), case)


@pytest.mark.parametrize("how", SHARDED)
def test_taus_of_bf16(how: str, under_torch: Any) -> None:
    """Invariant 2 where gradients arrive in bf16 and tie: tau is theirs, and every tie is kept and counted."""
    torch_jobs.check_taus([result["risks"] for result in under_torch()], how)


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_refused(dtype: torch.dtype) -> None:
    """Without fp32 weights a small update is lost; the message says how to have bf16 with them."""
    with pytest.raises(RefusedConfiguration, match=r"embeddings.*low precision.*torch\.float32.*autocast"):
        torch_jobs.prepare(make_model(FEW[0]).to(dtype))
    frozen = make_model(Case(frozen=True))
    frozen.embeddings.to(dtype)
    torch_jobs.prepare(frozen, [(n, p) for n, p in frozen.named_parameters() if p.requires_grad])


def test_low_precision_shards_are_refused(under_torch: Any) -> None:
    assert all("low precision" in result["refused"] for result in under_torch())
