"""first_order="halves": the gradient that is kept in the middle of a step, and steps that have no middle.

That masks and weights are the twin's is in test_methods.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_jobs
from plain_jobs import build
from reference import train
from spawn import run_ranks
from tiny import Case, make_model, micro_batch, rows
from torch import Tensor
from zero_jobs import Job, believe_in_fp16, fp16, start

from rose_ds import RefusedConfiguration, RoseAdamW, Stepper, prepare
from rose_ds.objectives import RDrop

HALVES = Case("first", first_order="halves", accumulation=2, dropout=0.0, clip=0.05)
BF16 = {"bf16": {"enabled": True}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
#: DeepSpeed adds gradients up in another place for each of these: (stage, zero_optimization, the rest, tolerance)
PLACES: dict[str, tuple[int, dict[str, Any], dict[str, Any], float]] = {
    "zero2": (2, {}, {}, 1e-6),
    "zero2-offload": (2, OFFLOAD, {}, 1e-6),
    "zero2-bf16": (2, {}, BF16, 1e-2),
    "zero2-bf16-offload": (2, OFFLOAD, BF16, 1e-2),
    "zero2-bf16-fp32": (2, {}, {**BF16, **FP32_SUMS}, 1e-2),
    "zero2-bf16-fp32-offload": (2, OFFLOAD, {**BF16, **FP32_SUMS}, 1e-2),
    "zero2-fp16": (2, {}, fp16(), 2e-3),
    "zero3": (3, {}, {}, 1e-6),
    "zero3-offload": (3, OFFLOAD, {}, 1e-6),
    "zero3-bf16": (3, {}, BF16, 1e-2),
    "zero3-bf16-fp32-offload": (3, OFFLOAD, {**BF16, **FP32_SUMS}, 1e-2),
    "zero3-fp16": (3, {}, fp16(), 2e-3),
}


class Seen:
    """What was ranked in a stepper's steps, and the whole gradient before clipping."""

    def __init__(self, stepper: Stepper) -> None:
        self.ranked: list[Tensor] = []
        self.whole: list[Tensor] = []
        masking = stepper.masking
        original = masking._inputs

        def look(grads: Any, risk_grads: Any, *, scale: Any, clip: float, share: float) -> Any:
            self.whole.append(torch.cat([g.float() * float(scale) / clip for g in grads]).clone())
            self.ranked.append(torch.cat(list(risk_grads)).clone() if risk_grads is not None else torch.zeros(0))
            return original(grads, risk_grads, scale=scale, clip=clip, share=share)

        masking._inputs = look  # type: ignore[method-assign]


def differences(rank: int, world: int, names: list[str]) -> dict[str, tuple[float, float]]:
    """Of what a step of two micro-batches ranks, and the difference of the same micro-batches' gradients, each taken by
    a step of its own: relative error, and how much of the gradients the difference is."""
    warnings.filterwarnings("ignore")
    believe_in_fp16()
    found = {}
    for name in names:
        stage, zero, config, _ = PLACES[name]
        torch.manual_seed(0)
        engine, stepper = start(Job(HALVES, stage, zero, config), world)
        seen = Seen(stepper)
        train(stepper, engine, replace(HALVES, steps=1), rank, world)
        engine.destroy()
        apart = []
        for micro in range(2):
            # a second-order risk looks at the gradient, and needs one micro-batch
            alone = Case("second", accumulation=1, dropout=0.0, clip=0.05, batch=HALVES.batch // 2)
            engine, stepper = start(Job(alone, stage, zero, config), world)
            each = Seen(stepper)
            ids, labels = micro_batch(HALVES, 1, micro)
            share = len(ids) // world
            mine = slice(rank * share, (rank + 1) * share)
            step(stepper, engine, ids[mine], labels[mine])
            apart += each.whole
            engine.destroy()
        wanted = (apart[0] - apart[1]) / 2  # a micro-batch's gradient counts half of a step's
        scale = max(g.norm() for g in apart)
        found[name] = (float((seen.ranked[0] - wanted).norm() / scale), float(wanted.norm() / scale))
    return found


def step(stepper: Stepper, model: Any, ids: Tensor, labels: Tensor) -> Any:
    with rows(len(ids), slice(0, len(ids))):
        stepper.backward(lambda: model(ids), lambda logits: F.cross_entropy(logits.float(), labels))
        return stepper.step()


@pytest.fixture(scope="module")
def found(extensions: object) -> Any:
    return run_ranks(differences, 2, list(PLACES), timeout=180, process_group=False)


@pytest.mark.parametrize("name", PLACES)
def test_where_deepspeed_adds_gradients_up(name: str, found: Any) -> None:
    for of_rank in found:
        error, size = of_rank[name]
        assert error < PLACES[name][3], (error, size)
        assert size > 0.1, "the micro-batches' gradients are too alike to tell anything"


def refusals(rank: int, world: int, jobs: list[Job]) -> list[str]:
    warnings.filterwarnings("ignore")
    told = []
    for job in jobs:
        with pytest.raises(RefusedConfiguration) as caught:
            start(job, world)
        told.append(str(caught.value))
    return told


def test_stages_that_reduce_at_the_end(extensions: object) -> None:
    jobs = [Job(HALVES, 0), Job(HALVES, 0, {}, BF16), Job(HALVES, 1), Job(HALVES, 1, {}, {**BF16, **FP32_SUMS})]
    for told in run_ranks(refusals, 1, jobs, process_group=False)[0]:
        assert 'first_order="halves"' in told and "use ZeRO stage 2 or 3" in told


# --- steps of other lengths, on the plain engine ---


def micro(stepper: Stepper, model: Any, t: int, i: int) -> Any:
    """The gradients of a step's i-th micro-batch."""
    ids, labels = micro_batch(HALVES, t, i)
    with rows(len(ids), slice(0, len(ids))):
        return stepper.backward(lambda: model(ids), lambda logits: F.cross_entropy(logits, labels))


def both(stepper: Stepper, model: Any, t: int) -> Any:
    """A step of two."""
    micro(stepper, model, t, 0)
    assert stepper.step() is None
    micro(stepper, model, t, 1)
    return stepper.step()


@pytest.mark.fast
def test_without_dropout() -> None:
    """Rows differ, so nothing is missing; and no pass is run twice, nor are logits asked for."""
    model, stepper = build(HALVES)
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    assert not stepper.compares
    values = micro(stepper, model, 1, 0)
    assert values["kl"] is None and values["disagreement"] is None
    assert stepper.step() is None
    micro(stepper, model, 1, 1)
    report = stepper.step()
    assert len(passes) == 2
    assert report.kept_first == int(0.6 * report.eligible) and report.tau_first > 0


@pytest.mark.fast
@pytest.mark.parametrize("told", [2, 4, 6])
def test_a_short_step(told: int) -> None:
    """A step of fewer micro-batches than the loop told, as at an epoch's end, compares its first with the others."""
    model, stepper = build(replace(HALVES, accumulation=told, clip=0.0))
    seen = Seen(stepper)
    for i in range(2):
        micro(stepper, model, 1, i)
        stepper.leave_step_to_optimizer(last=i == 1, grad_norm=lambda: None)
    gradients = [p.grad.clone() for p in model.parameters()]
    stepper.optimizer.step()
    assert stepper.last_report.kept_first == int(0.6 * stepper.last_report.eligible)
    assert any(g.any() for g in gradients)
    other, alone = build(replace(HALVES, accumulation=told, clip=0.0))
    early = Seen(alone)
    micro(alone, other, 1, 0)
    wanted = torch.cat([g.reshape(-1) for g in alone.engine.slice_grads()]) * 2 - seen.whole[0]
    torch.testing.assert_close(seen.ranked[0], wanted)
    assert not early.ranked


@pytest.mark.fast
def test_micro_batches_that_weigh_differently() -> None:
    """As where a loss is divided by the tokens of a whole step: means are compared, not sums."""
    model, stepper = build(HALVES)
    seen, weights, means = Seen(stepper), (1.5, 0.5), []
    for i, weight in enumerate(weights):
        ids, labels = micro_batch(HALVES, 1, i)
        with rows(len(ids), slice(0, len(ids))):
            means.append(torch.autograd.grad(F.cross_entropy(model(ids), labels), eligible_of(stepper)))
            stepper.backward(
                lambda ids=ids: model(ids),
                lambda logits, labels=labels, weight=weight: weight * F.cross_entropy(logits, labels),
                weight=torch.tensor(weight),
            )
            stepper.step()
    early, late = (torch.cat([g.reshape(-1) for g in mean]) for mean in means)
    # of a whole weight of 2, the second micro-batch has a quarter
    torch.testing.assert_close(seen.ranked[0], (early - late) / 4, rtol=1e-3, atol=1e-7)


#: Of the micro-batches of each of two ranks.
WEIGHTS = ((1.5, 0.5), (0.25, 1.0))


def weighed(rank: int, world: int) -> tuple[Tensor, Any]:
    """What a rank ranks, and its threshold."""
    model, stepper = torch_jobs.start(torch_jobs.Job(HALVES, "ddp"))
    seen = Seen(stepper)
    for i, weight in enumerate(WEIGHTS[rank]):
        ids, labels = micro_batch(HALVES, 1, i)
        share = len(ids) // world
        mine = slice(rank * share, (rank + 1) * share)
        with rows(len(ids), mine):
            stepper.backward(
                lambda ids=ids[mine]: model(ids),
                lambda logits, y=labels[mine], w=weight: w * F.cross_entropy(logits, y),
                weight=torch.tensor(weight),
            )
        report = stepper.step()
    assert report is not None
    return seen.ranked[0], (report.tau_first, report.kept_first)


def test_ranks_weigh_their_micro_batches_together() -> None:
    """By the weights of all ranks: replicas that each took their own would part."""
    (ranked, told), (other, also) = run_ranks(weighed, 2)
    assert torch.equal(ranked, other) and told == also
    model, stepper = build(HALVES)
    halves = []
    for i in range(2):
        ids, labels = micro_batch(HALVES, 1, i)
        parts = zip(ids.chunk(2), labels.chunk(2), WEIGHTS, strict=True)
        with rows(len(ids) // 2, slice(0, len(ids) // 2)):
            loss = sum(weights[i] * F.cross_entropy(model(x), y) for x, y, weights in parts) / 4  # ranks, micro-batches
        halves.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, eligible_of(stepper))]))
    # of a whole weight of 3.25 the first halves have 1.75
    wanted = halves[0] * 3.25 / 1.75 - halves[0] - halves[1]
    torch.testing.assert_close(ranked, wanted, rtol=1e-3, atol=1e-7)


def eligible_of(stepper: Stepper) -> list[Any]:
    return [piece.param for piece in stepper.engine.slices]


@pytest.mark.fast
def test_a_step_that_the_loop_drops() -> None:
    """Its gradients are gone, and so is what was kept of them; of an exact risk too."""
    for case in (replace(HALVES, clip=0.0), Case("first", accumulation=2, clip=0.0)):
        runs = []
        for drops in (False, True):
            model, stepper = build(case)
            for t in (5, 1) if drops else (1,):
                torch.manual_seed(t)
                for i in (0, 1):
                    micro(stepper, model, t, i)
                    stepper.leave_step_to_optimizer(last=i == 1, grad_norm=lambda: None)
                if t == 5:
                    stepper.optimizer.zero_grad()
            stepper.optimizer.step()
            runs.append(stepper.gather_parameters())
        assert all(torch.equal(p, runs[1][name]) for name, p in runs[0].items())


@pytest.mark.fast
@pytest.mark.parametrize("case", [HALVES, Case("second", objective=RDrop(), accumulation=2)], ids=["halves", "r-drop"])
def test_masks_know_how_the_loop_clips(case: Case) -> None:
    """As those of a stepper that clips itself: what is ranked is the clipped gradient, less what clipping did not."""
    runs, limit = [], 0.05
    for own in (False, True):
        model, stepper = build(replace(case, clip=0.0 if own else limit))
        for t in (1, 2):
            norms: list[Any] = []
            torch.manual_seed(t)
            for i in (0, 1):
                micro(stepper, model, t, i)
                if own:
                    told = {"grad_norm": lambda norms=norms: float(norms[0]), "max_grad_norm": limit}
                    stepper.leave_step_to_optimizer(last=i == 1, **told)
                else:
                    stepper.step()
            if own:
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
                assert norms[0] > 2 * limit
                stepper.optimizer.step()
                stepper.optimizer.zero_grad()
        report = stepper.last_report
        runs.append((report.tau_first or report.tau_second, report.kept_fraction, stepper.gather_parameters()))
    assert runs[0][:2] == pytest.approx(runs[1][:2], rel=1e-4)
    for name, p in runs[0][2].items():
        torch.testing.assert_close(p, runs[1][2][name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.fast
def test_a_loop_that_does_not_tell_how_it_clips() -> None:
    model, stepper = build(replace(HALVES, clip=0.0))
    micro(stepper, model, 1, 0)
    with pytest.raises(TypeError, match="grad_norm=lambda: None where the loop does not clip"):
        stepper.leave_step_to_optimizer(last=False)


@pytest.mark.fast
def test_a_step_of_one_micro_batch(caplog: pytest.LogCaptureFixture) -> None:
    """Updates everything, and says so; three in a row are a mistake."""
    model, stepper = build(replace(HALVES, accumulation=1))
    with caplog.at_level(logging.WARNING):
        for t in (1, 2):
            micro(stepper, model, t, 0)
            assert stepper.step().kept_first is None
    assert caplog.text.count("no halves to compare") == 1
    stepper.engine.accumulation_steps = 2
    report = both(stepper, model, 3)
    assert report.kept_first == int(0.6 * report.eligible)
    stepper.engine.accumulation_steps = 1
    for t in (4, 5):
        micro(stepper, model, t, 0)
        stepper.step()
    micro(stepper, model, 6, 0)
    with pytest.raises(RuntimeError, match="3 steps in a row had one micro-batch: accumulate"):
        stepper.step()


@pytest.mark.fast
def test_a_step_of_one_micro_batch_with_an_average() -> None:
    """Ranks the average of the steps before."""
    model, stepper = build(replace(HALVES, risk_ema=0.5))
    before = both(stepper, model, 1)
    stepper.engine.accumulation_steps = 1
    micro(stepper, model, 2, 0)
    report = stepper.step()
    assert (report.kept_first, report.tau_first) == (before.kept_first, before.tau_first)


@pytest.mark.fast
def test_a_failed_micro_batch_is_forgotten() -> None:
    runs = []
    for fails in (False, True):
        model, stepper = build(HALVES)
        if fails:
            micro(stepper, model, 5, 0)
            stepper.step()
            with pytest.raises(ZeroDivisionError):
                stepper.backward(lambda: 1 // 0, lambda logits: logits.sum())
        runs.append((both(stepper, model, 1), stepper.gather_parameters()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(p, runs[1][1][name]) for name, p in runs[0][1].items())


@pytest.mark.fast
def test_equal_halves() -> None:
    """The same rows twice, without dropout."""
    model, stepper = build(replace(HALVES, clip=0.0))
    micro(stepper, model, 1, 0)
    stepper.step()
    micro(stepper, model, 1, 0)
    with pytest.raises(RuntimeError, match="two halves of a step are equal everywhere"):
        stepper.step()


@pytest.mark.fast
def test_warm_up_and_other_steps_keep_nothing() -> None:
    model, stepper = build(replace(HALVES, mask_warmup_steps=1, risk_every=2))
    kept = []
    original = stepper.engine.keep_gradient_so_far
    stepper.engine.keep_gradient_so_far = lambda: (kept.append(stepper.optimizer.steps_taken()), original())
    for t in range(1, 6):
        both(stepper, model, t)
    assert kept == [1, 3]


@pytest.mark.fast
def test_not_with_r_drop() -> None:
    model = make_model(HALVES)
    optimizer = RoseAdamW(model.named_parameters(), **HALVES.rose)
    with pytest.raises(RefusedConfiguration, match='leave first_order="halves" out'):
        prepare(model, optimizer, objective="r-drop", accumulation_steps=2)
