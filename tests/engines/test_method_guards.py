"""What would spoil a method without a word: a lost mask, logits changed in place, a failed pass, an overflow."""

from __future__ import annotations

import math
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zero_jobs
from plain_jobs import build, one_step
from reference import train
from spawn import run_ranks
from tiny import Case, make_model, micro_batch, rows
from torch import Tensor
from torch_jobs import message_of

from rose_ds import RefusedConfiguration, RoseAdamW, prepare
from rose_ds.objectives import FreeLB, RDrop, Smart
from rose_ds.training.mask_record import FILE, MaskRecorder, read_masks

KEEPING = {
    "gallop": Case("gallop"),
    "child-tuning": Case("child-tuning"),
    "risk-average": Case("ensemble", risk_ema=0.7),
    "smart-average": Case(objective=Smart(init_std=1e-2, radius=0.2, proximal=1.5)),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", ["gallop", "child-tuning", "risk-average", "smart-average"])
def test_what_a_method_keeps_does_not_begin_anew(name: str, tmp_path: Path) -> None:
    """In a run that goes on without it: a mask would be found in half-trained weights, an average be of few steps."""
    case = replace(KEEPING[name], steps=2)
    model, stepper = build(case)
    train(stepper, model, case)
    stepper.save_state(tmp_path)
    weights, moments = model.state_dict(), stepper.optimizer.state_dict()
    model, stepper = build(case)
    model.load_state_dict(weights)
    stepper.optimizer.load_state_dict(moments)
    with pytest.raises(RefusedConfiguration, match=r"2 optimizer steps .*: call stepper\.load_state\(\)"):
        one_step(model, stepper, 3)
    if stepper.needs_fisher_pass:
        with pytest.raises(RefusedConfiguration, match="2 optimizer steps"):
            stepper.fisher_pass([])
    stepper.load_state(tmp_path)
    assert one_step(model, stepper, 3).step == 3


@pytest.mark.fast
@pytest.mark.parametrize("objective", [None, RDrop()], ids=["first", "r-drop"])
def test_logits_changed_in_place(objective: Any) -> None:
    """They are the ones that are compared; where none are, a loss may do with them what it likes."""
    labels = micro_batch(Case(), 1, 0)[1]

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.div_(2.0), labels)

    case = Case("first") if objective is None else Case("none", objective=objective)
    model, stepper = build(case)
    with pytest.raises(RuntimeError, match="changed the logits in place"):
        one_step(model, stepper, 1, loss)
    assert not one_step(model, stepper, 1).skipped
    model, stepper = build(Case("second"))
    assert not one_step(model, stepper, 1, loss).skipped


@pytest.mark.fast
@pytest.mark.parametrize("objective", [Smart(init_std=1e-2), FreeLB(init_mag=0.5)], ids=lambda o: o.name)
def test_nothing_is_shifted_after_a_failed_pass(objective: Any) -> None:
    model, stepper = build(Case("none", objective=objective))
    ids, _ = micro_batch(Case(), 1, 0)
    with torch.no_grad():
        wanted = model.eval()(ids)
    model.train()

    def failing() -> Tensor:
        logits = model(ids)
        if stepper._shifter.shift is not None:
            raise MemoryError("no room")
        return logits

    with pytest.raises(MemoryError, match="no room"):
        one_step(model, stepper, 1, forward=failing)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids), wanted)
    model.train()
    assert not one_step(model, stepper, 1).skipped


@pytest.mark.fast
def test_batches_of_the_fisher_pass_that_overflow(caplog: pytest.LogCaptureFixture) -> None:
    """Are left out, and nothing of a pass that failed is left."""
    case = Case("child-tuning", keep_first=0.3, dropout=0.0, accumulation=3)
    total = len(micro_batch(case, 1, 0)[0])

    def found_from(*factors: float) -> list[Tensor]:
        """The mask of batches whose losses are multiplied so; a factor of 0 is an error."""
        model, stepper = build(case)

        def batches() -> Any:
            for i, factor in enumerate(factors):
                ids, labels = micro_batch(case, 1, i)
                if factor == 0:
                    raise MemoryError("no room")
                yield (lambda ids=ids: model(ids)), (lambda z, y=labels, f=factor: F.cross_entropy(z, y) * f)

        with rows(total, slice(0, total)):
            try:
                stepper.fisher_pass(batches(), max_grad_norm=1.0)
            except MemoryError:
                assert stepper.needs_fisher_pass and stepper.engine.take_risk_grads() is None
                raise
        return list(stepper.state.selection.codes)

    with_inf, alone = found_from(1.0, math.inf), found_from(1.0)
    assert "left 1 batches out" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(with_inf, alone, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(alone, found_from(1.0, 1.0), strict=True))
    for factors, error, message in (
        ((math.nan, math.inf), FloatingPointError, r"every batch of the Fisher pass \(2\) is inf or NaN"),
        ((1.0, 0.0), MemoryError, "no room"),
        ((), ValueError, "was given no batch"),
    ):
        with pytest.raises(error, match=message):
            found_from(*factors)


@pytest.mark.fast
def test_a_record_follows_what_is_unfrozen(tmp_path: Path) -> None:
    """Its head names what is masked from then on."""
    case = Case("second")
    model = make_model(case)
    model.layer[1].requires_grad_(False)
    optimizer = RoseAdamW(model.named_parameters(), **case.rose)
    stepper = prepare(model, optimizer)
    recorder = stepper.masking.recorder = MaskRecorder(stepper, tmp_path, every=1)
    one_step(model, stepper, 1)
    one_step(model, stepper, 2)
    few = read_masks(tmp_path / FILE)[0]["names"]
    model.layer[1].requires_grad_(True)
    one_step(model, stepper, 3)
    one_step(model, stepper, 4)
    head, lines = read_masks(tmp_path / FILE)
    assert set(few) < set(head["names"]) == set(stepper.eligible)
    assert [line["step"] for line in lines] == [3, 4] and recorder.layout is stepper.engine.layout
    head, lines = read_masks(tmp_path / "masks-to-step-2.jsonl")
    assert head["names"] == few and [line["step"] for line in lines] == [1, 2]
    assert not lines[0]["same"] and lines[1]["same"]


# --- under DeepSpeed ---


def loaded_at_odd_times(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Checkpoints of runs that keep something and of such that do not, read where it matters."""
    plain, keeping = Case("ensemble", steps=2), Case("ensemble", steps=2, risk_ema=0.7)
    found: dict[str, Any] = {}
    for name, case in (("plain", plain), ("keeping", keeping)):
        engine, stepper = zero_jobs.start(zero_jobs.Job(case, 2), world)
        train(stepper, engine, case, rank, world)
        engine.save_checkpoint(f"{folder}/{name}", tag=0)
        engine.destroy()
    found["tag"] = (Path(folder) / "plain" / "0").is_dir()
    engine, stepper = zero_jobs.start(zero_jobs.Job(keeping, 2), world)
    before = {name: p.clone() for name, p in stepper.gather_parameters().items()}
    found["switched on"] = message_of(lambda: engine.load_checkpoint(f"{folder}/plain"))
    found["unchanged"] = all(torch.equal(p, before[n]) for n, p in stepper.gather_parameters().items())
    engine.destroy()
    engine = alone(keeping, world)
    engine.load_checkpoint(f"{folder}/keeping")
    stepper = prepare(engine)
    once = replace(keeping, steps=1)
    found["before prepare"] = message_of(lambda: train(stepper, engine, once, rank, world, first_step=3))
    stepper.load_state(f"{folder}/keeping/0")
    late = train(stepper, engine, once, rank, world, first_step=3).reports
    engine.destroy()
    engine, stepper = zero_jobs.start(zero_jobs.Job(keeping, 2), world)
    engine.load_checkpoint(f"{folder}/keeping", tag=0)
    found["the same"] = train(stepper, engine, once, rank, world, first_step=3).reports == late
    engine.destroy()
    engine = alone(keeping, world, checkpoint={"use_node_local_storage": True})
    name, socket.gethostname = socket.gethostname, lambda: f"host-{rank}"
    found["own folders"] = message_of(lambda: prepare(engine))
    socket.gethostname = name
    found["one host"] = message_of(lambda: prepare(engine))
    engine.destroy()
    return found


def alone(case: Case, world: int, **more: Any) -> Any:
    """An engine that nobody has prepared."""
    import deepspeed

    model = make_model(case)
    config = zero_jobs.ds_config(zero_jobs.Job(case, 2), world)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config={**config, **more})
    return engine


def test_loaded_at_odd_times(extensions: Path, tmp_path: Path) -> None:
    for found in run_ranks(loaded_at_odd_times, 2, str(tmp_path), timeout=400):
        assert found["tag"] and found["unchanged"] and found["the same"], found
        assert "without what this method keeps over a run" in found["switched on"]
        assert "call stepper.load_state()" in found["before prepare"]
        assert "checkpoint.use_node_local_storage leaves each host" in found["own folders"]
        assert not found["one host"]
