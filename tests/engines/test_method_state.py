"""Invariant 7: a mask found once and an average of the weights are part of the checkpoint, on any number of ranks."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch_jobs
import zero_jobs
from plain_jobs import build, one_step
from reference import Run, check_parity, reference, train
from spawn import run_ranks
from tiny import Case, make_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import set_state_dict

from rose_ds import RefusedConfiguration
from rose_ds.objectives import Smart

BEFORE, AFTER = 2, 2
SEGMENTS = ((1, BEFORE), (1 + BEFORE, AFTER))
SMART = Smart(init_std=1e-2, radius=0.2, proximal=1.5, decay=0.7, early_decay=0.4, early_steps=1)
CASES = {
    "child-tuning": Case("child-tuning", keep_first=0.3, accumulation=2, hidden=24),
    "gallop-tensor": Case("gallop", "tensor", hidden=24),
    "smart-average": Case("ensemble", objective=SMART, hidden=24),
    "risk-average": Case("ensemble", risk_ema=0.7, risk_every=3, hidden=24),
}
TORCH = ("ddp", "fsdp2", "fsdp2-columns", "fsdp1-FULL_SHARD-orig")
ZERO = (1, 2, 3)
WORLDS = (1, 3)
#: FSDP1 on one rank shards nothing
REFUSED = ("fsdp1-FULL_SHARD-orig", "smart-average", 1)


def halves(case: Case) -> tuple[Case, Case]:
    return replace(case, steps=BEFORE), replace(case, steps=AFTER)


def other_weights(case: Case) -> Any:
    model = make_model(case)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    return model


def save(rank: int, world: int, folder: str) -> None:
    """Every case on every engine, up to the interruption."""
    warnings.filterwarnings("ignore")
    for name, case in CASES.items():
        first, _ = halves(case)
        for how in TORCH:
            job, at = torch_jobs.Job(first, how), f"{folder}/{how}-{name}"
            model, stepper = torch_jobs.start(job)
            train(stepper, model, first, rank, world)
            state = torch_jobs._state(model, stepper, how)
            if not how.startswith("fsdp1"):
                dcp.save(state, checkpoint_id=at)
            elif rank == 0:
                Path(at).mkdir()
                torch.save(state, f"{at}/full.pt")
            torch.distributed.barrier()
            stepper.save_state(at)
        for stage in ZERO:
            engine, stepper = zero_jobs.start(zero_jobs.Job(first, stage), world)
            train(stepper, engine, first, rank, world)
            engine.save_checkpoint(f"{folder}/zero{stage}-{name}", tag="last")
            engine.destroy()


def go_on(rank: int, world: int, folder: str) -> dict[str, Run]:
    """Every case on every engine, from other weights and the checkpoint."""
    warnings.filterwarnings("ignore")
    runs = {}
    for name, case in CASES.items():
        _, second = halves(case)
        for how in TORCH:
            job, at = torch_jobs.Job(second, how), f"{folder}/{how}-{name}"
            model, stepper = torch_jobs.start(job, other_weights(second))
            state = torch_jobs._state(model, stepper, how)
            if how.startswith("fsdp1"):
                state = torch.load(f"{at}/full.pt", weights_only=False)
            else:
                dcp.load(state, checkpoint_id=at)
            load_into(model, stepper, state, how)
            if (how, name, world) == REFUSED:
                with pytest.raises(RefusedConfiguration, match="shards nothing"):
                    stepper.load_state(at)
                continue
            stepper.load_state(at)
            runs[f"{how}-{name}"] = train(stepper, model, second, rank, world, first_step=1 + BEFORE)
        for stage in ZERO:
            engine, stepper = zero_jobs.start(zero_jobs.Job(second, stage), world, other_weights(second))
            engine.load_checkpoint(f"{folder}/zero{stage}-{name}")
            runs[f"zero{stage}-{name}"] = train(stepper, engine, second, rank, world, first_step=1 + BEFORE)
            engine.destroy()
    return runs


def load_into(model: nn.Module, stepper: Any, state: Any, how: str) -> None:
    set_state_dict(
        model,
        stepper.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=torch_jobs._options(how),
    )


@pytest.fixture(scope="module")
def resumed(extensions: object, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Run]]]:
    """Saved on two ranks, then the runs of one and of three."""
    folder = str(tmp_path_factory.mktemp("states"))
    run_ranks(save, 2, folder, timeout=400)
    return {world: run_ranks(go_on, world, folder, timeout=400) for world in WORLDS}


def far_but_for(few: int, got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Relative error of all elements but the few that are furthest away."""
    differences = torch.cat([(got[name] - p).abs().flatten() for name, p in want.items()]).sort().values
    return float(differences[:-few].norm() / torch.cat([p.flatten() for p in want.values()]).norm())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", [*TORCH, *(f"zero{stage}" for stage in ZERO)])
def test_other_ranks(engine: str, name: str, world: int, resumed: Any, parity_log: list[str]) -> None:
    """The run that goes on elsewhere is the twin's that was interrupted at the same step."""
    if (engine, name, world) == REFUSED:
        assert all(f"{engine}-{name}" not in rank for rank in resumed[world])
        return
    runs, twin = [rank[f"{engine}-{name}"] for rank in resumed[world]], reference(CASES[name], SEGMENTS)
    # one element's first gradient is 1.6e-9, the rounding of a sum whose terms cancel: beside eps, 1e-8, AdamW makes of
    # it a step as long as any, which processors round their own way
    found = check_parity(runs[0].parameters, twin, tolerance=1e-4)
    assert far_but_for(4, runs[0].parameters, twin.parameters) < 1e-5
    parity_log.append(f"{engine}-{name} 2->{world}: {found}")
    kept = [step.kept for step in twin.steps[BEFORE:]]
    for run in runs:
        assert [report.kept_first for report in run.reports] == [k["first"] for k in kept]
        assert run.reports == runs[0].reports


# --- on one process ---


def saved(case: Case, folder: Path) -> Any:
    model, stepper = build(case)
    train(stepper, model, replace(case, steps=BEFORE))
    stepper.save_state(folder)
    return model.state_dict(), stepper.optimizer.state_dict()


def resumed_here(case: Case, state: Any) -> Any:
    model, stepper = build(case)
    model.load_state_dict(state[0])
    stepper.optimizer.load_state_dict(state[1])
    return stepper


@pytest.mark.fast
def test_nothing_to_keep(tmp_path: Path) -> None:
    """Methods that keep nothing write nothing, and ask for nothing."""
    state = saved(Case(), tmp_path)
    assert not list(tmp_path.iterdir())
    resumed_here(Case(), state).load_state(tmp_path)


@pytest.mark.fast
@pytest.mark.parametrize("case", [CASES["child-tuning"], CASES["smart-average"]], ids=str)
def test_missing(case: Case, tmp_path: Path) -> None:
    """Going on without what the method kept would be another run."""
    state = saved(case, tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(RefusedConfiguration, match="has no rose_state files"):
        resumed_here(case, state).load_state(tmp_path)


@pytest.mark.fast
def test_saved_before_there_was_anything(tmp_path: Path) -> None:
    """In a warm-up, which the run that goes on may have shorter."""
    case = replace(CASES["risk-average"], mask_warmup_steps=BEFORE + 3)
    state = saved(case, tmp_path)
    assert "risk" not in torch.load(next(tmp_path.iterdir()), weights_only=True)
    stepper = resumed_here(replace(case, mask_warmup_steps=0), state)
    stepper.state.require(tmp_path, converted=False)
    stepper.load_state(tmp_path)
    assert stepper.state.risk.values is None


@pytest.mark.fast
@pytest.mark.parametrize(
    ("then", "now", "lacks"), [("risk-average", "smart-average", "average"), ("smart-average", "risk-average", "risk")]
)
def test_what_another_method_kept(then: str, now: str, lacks: str, tmp_path: Path) -> None:
    """Files that are there, and hold something else, are none."""
    state = saved(CASES[then], tmp_path)
    stepper = resumed_here(CASES[now], state)
    with pytest.raises(RefusedConfiguration, match=f"without the {lacks} that this method keeps"):
        stepper.load_state(tmp_path)
    with pytest.raises(RefusedConfiguration, match=f"without the {lacks} that this method keeps"):
        stepper.state.require(tmp_path, converted=False)  # before DeepSpeed changes anything


@pytest.mark.fast
def test_another_method_or_model(tmp_path: Path) -> None:
    """Names the strategy, or the parameter that is not there."""
    case = CASES["child-tuning"]
    state = saved(case, tmp_path)
    with pytest.raises(RefusedConfiguration, match="strategy='child-tuning', not 'gallop'"):
        resumed_here(replace(case, strategy="gallop"), state).load_state(tmp_path)
    _, deeper = build(replace(case, depth=3))
    deeper.optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(RefusedConfiguration, match=r"lacks elements of 'layer\.2\."):
        deeper.load_state(tmp_path)
    (path,) = tmp_path.iterdir()
    path.rename(tmp_path / "rose_state-00000-of-00002.pt")
    with pytest.raises(RefusedConfiguration, match="1 of 2 rose_state files"):
        resumed_here(case, state).load_state(tmp_path)
    saved(case, tmp_path)  # over what another number of ranks left
    resumed_here(case, state).load_state(tmp_path)


@pytest.mark.fast
def test_fisher_pass_comes_first() -> None:
    """A step without a mask is refused, and a method without a Fisher pass refuses one."""
    model, stepper = build(replace(CASES["child-tuning"], accumulation=1))
    assert stepper.needs_fisher_pass
    with pytest.raises(RuntimeError, match=r"call stepper\.fisher_pass\(batches\)"):
        one_step(model, stepper, 1)
    _, other = build(Case())
    with pytest.raises(ValueError, match="needs no fisher_pass"):
        other.fisher_pass([])
    with pytest.raises(ValueError, match="given no batch"):
        stepper.fisher_pass([])
