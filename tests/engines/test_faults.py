"""A rank that is lost, late or sees NaN: every other rank hears of it, and no step is half taken."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch_jobs
import zero_jobs
from plain_jobs import build
from reference import check_parity, reference
from spawn import RanksFailed, run_ranks
from tiny import DROPOUT_SEED, Case, micro_batch, rows
from torch import Tensor

from rose_ds.exchange import RankLost, explaining_lost_ranks
from rose_ds.optimizer import local

ZERO = tuple(f"zero{stage}" for stage in range(4))
#: the other stages: test_zero_invariants.py
ENGINES = ("ddp", "fsdp1-FULL_SHARD-orig", "fsdp1-NO_SHARD-flat", "fsdp2", "zero3")
BAD_STEP = 3


def start(how: str, case: Case, world: int) -> tuple[Any, Any]:
    if how in ZERO:
        return zero_jobs.start(zero_jobs.Job(case, int(how[-1])), world)
    return torch_jobs.start(torch_jobs.Job(case, how))


def steps(model: Any, stepper: Any, case: Case, rank: int, world: int, spoil: Callable[[int, Tensor], Tensor]) -> Any:
    """Reports of a run whose logits pass through ``spoil``; a generator, so that a caller may stop early."""
    torch.manual_seed(DROPOUT_SEED)
    for t in range(1, case.steps + 1):
        ids, labels = micro_batch(case, t, 0)
        share = len(ids) // world
        mine = slice(rank * share, (rank + 1) * share)

        def forward(t: int = t, ids: Tensor = ids, mine: slice = mine) -> Tensor:
            return spoil(t, model(ids[mine]))

        with rows(len(ids), mine):
            stepper.backward(forward, lambda z, y=labels[mine]: F.cross_entropy(z, y))
            report = stepper.step()
        yield report


# --- NaN on one rank; a rank that holds nothing ---


def state_of(stepper: Any) -> list[Tensor]:
    """Copies of everything that a step may change on this rank."""
    optimizer = stepper.optimizer
    moments = [s[k] for s in optimizer.state.values() for k in ("step", "exp_avg", "exp_avg_sq") if k in s]
    parameters = [stepper.gather_parameters()[name] for name, _ in stepper.engine.named_parameters()]
    return [local(t).clone() for t in (*moments, *parameters)]


def nan_on_one_rank(rank: int, world: int) -> dict[str, dict[str, Any]]:
    found = {}
    for how in ENGINES:
        model, stepper = start(how, Case(), world)

        def spoil(t: int, logits: Tensor) -> Tensor:
            return logits * float("nan") if rank == 1 and t == BAD_STEP else logits

        reports, states = [], []
        for report in steps(model, stepper, Case(), rank, world, spoil):
            reports.append(report)
            states.append(state_of(stepper))
        before, after = states[BAD_STEP - 2 : BAD_STEP]
        found[how] = {
            "reports": reports,
            "unchanged": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
            "changes": not all(torch.equal(a, b) for a, b in zip(after, states[BAD_STEP], strict=True)),
            "finite": all(t.isfinite().all() for t in states[-1]),
            "parameters": stepper.gather_parameters(),
        }
        if how in ZERO:
            model.destroy()
    return found


nan_runs = torch_jobs.once(lambda world: run_ranks(nan_on_one_rank, world))


@pytest.mark.parametrize("how", ENGINES)
def test_nan_on_one_rank_skips_the_step_on_all(extensions: None, how: str) -> None:
    runs = [result[how] for result in nan_runs(2)]
    for run in runs:
        assert [r.skipped for r in run["reports"]] == [t == BAD_STEP for t in range(1, 6)]
        assert [r.step for r in run["reports"]] == [1, 2, 2, 3, 4], "a skipped step is not counted"
        assert run["unchanged"] and run["changes"] and run["finite"]
    for name, p in runs[0]["parameters"].items():
        assert torch.equal(p, runs[1]["parameters"][name]), "the ranks go on with the same weights"
    assert all(r.tau_first is None for r in runs[0]["reports"] if r.skipped)


def one_scalar(rank: int, world: int) -> dict[str, Any]:
    """Only a weight of one element may be masked, so that all ranks but one hold no slice at all."""
    found = {}
    for how in ("fsdp1-FULL_SHARD-orig", "fsdp2", "zero1", "zero2", "zero3"):
        rose = {"include": (r"layer\.1\.gate\.weight",)}
        if how in ZERO:
            model, stepper = zero_jobs.start(zero_jobs.Job(Case(), int(how[-1])), world, **rose)
        else:
            model, stepper = torch_jobs.start(torch_jobs.Job(Case(), how), **rose)
        reports = list(steps(model, stepper, Case(), rank, world, lambda t, z: z))
        found[how] = sum(s.numel for s in stepper.engine.slices), reports
        if how in ZERO:
            model.destroy()
    return found


def test_a_rank_without_any_slice(extensions: None) -> None:
    results = run_ranks(one_scalar, 2)
    for how in results[0]:
        held = [result[how][0] for result in results]
        assert sorted(held) == [0, 1], f"{how}: one rank holds the element, the other nothing: {held}"
        assert results[0][how][1] == results[1][how][1], how
        for report in results[0][how][1]:
            assert report.eligible == report.kept_first == report.kept_second == 1 and report.tau_first > 0


# --- a rank that is gone ---


def lose_a_rank(rank: int, world: int, how: str, fault: str) -> Any:
    if fault == "waits":
        # not a second group with this timeout: its ranks might still find the first one's store
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=12))
    model, stepper = start(how, Case(), world)

    def spoil(t: int, logits: Tensor) -> Tensor:
        if fault == "killed" and rank == 1 and t == BAD_STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        return logits

    done = 0
    started = time.monotonic()
    try:
        for _ in steps(model, stepper, Case(), rank, world, spoil):
            done += 1
            started = time.monotonic()
            if fault != "killed" and rank == 1 and done == BAD_STEP - 1:  # its data loader is at the end
                if fault == "waits":
                    with explaining_lost_ranks(lambda: "the barrier"):
                        dist.barrier()
                return done
    except RankLost as error:
        seconds = time.monotonic() - started
        raise AssertionError(f"after {done} steps, {seconds:.1f} s: {error}") from error
    return done


@pytest.mark.parametrize("how", ["ddp", "fsdp2", "zero3"])
def test_a_killed_rank_ends_the_others_step(extensions: None, how: str) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(lose_a_rank, 2, how, "killed", timeout=90)
    check_lost(str(failed.value), within=30)
    assert "rank 1 died without a word, exit code -9" in str(failed.value)


@pytest.mark.parametrize("how", ["fsdp1-FULL_SHARD-orig", "zero2"])
def test_a_rank_whose_data_ends_early(extensions: None, how: str) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(lose_a_rank, 2, how, "ends", timeout=90)
    check_lost(str(failed.value), within=30)
    assert "its data loader ended earlier" in str(failed.value)


def test_a_rank_that_waits_elsewhere(extensions: None) -> None:
    """The rank with less data is alive, in another collective: the process group's timeout ends both."""
    with pytest.raises(RanksFailed) as failed:
        run_ranks(lose_a_rank, 2, "ddp", "waits", timeout=90)
    check_lost(str(failed.value), within=40)


def check_lost(message: str, within: float) -> None:
    found = re.search(r"after (\d) steps, ([\d.]+) s: another rank did not take part in optimizer step (\d)", message)
    assert found is not None, message
    assert int(found[1]) == BAD_STEP - 1 and int(found[3]) == BAD_STEP
    assert float(found[2]) < within


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="^two passes$"), explaining_lost_ranks(lambda: "a step"):
        raise RuntimeError("two passes")


def test_the_twin_of_these_runs_is_right() -> None:
    """The loop above, undisturbed, is the reference's."""
    model, stepper = build(Case())
    assert not any(r.skipped for r in steps(model, stepper, Case(), 0, 1, lambda t, z: z))
    check_parity(stepper.gather_parameters(), reference(Case()))
