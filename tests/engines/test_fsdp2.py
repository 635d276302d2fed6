"""fully_shard: the twin's parameters whatever the sharding, AdamW without a mask, checkpoints, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import Run, reference, train
from spawn import run_ranks
from tiny import DROPOUT_SEED, HYPER, Case, Tiny, make_model, micro_batch, parameter_groups, rows
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch_jobs import (
    BEFORE,
    EXTRAS,
    FEW,
    MATRIX,
    Job,
    check,
    check_taus,
    fsdp2,
    leak,
    load,
    message_of,
    once,
    prepare,
    risks_of_all,
    run_all,
    save,
    start,
)
from zero_jobs import check_ranks_agree, runs_of

import rose_ds
from rose_ds.objectives import Smart

#: rows that do not divide by columns sharding's ranks are refused by torch
EVEN = [replace(case, hidden=20) for case in FEW]
#: test_methods.py has every strategy
JOBS = [
    *(Job(case, "fsdp2") for case in EXTRAS),
    *(Job(case, how) for how in ("fsdp2", "fsdp2-kept", "fsdp2-checkpoint-wrapper", "fsdp2-offload") for case in FEW),
    *(Job(case, "fsdp2-columns") for case in EVEN),
]
BF16 = [Job(case, "fsdp2-bf16") for case in FEW]
AHEAD = [Case(accumulation=2, steps=1), Case("none", objective=Smart(), steps=1)]
ALONE = [case for case in MATRIX if case.accumulation == 1]


def adamw(rank: int, world: int) -> bool:
    """Whether strategy="none" is torch.optim.AdamW on the same DTensors, bit for bit."""
    case = Case("none", clip=0.0)
    ours = train(*reversed(start(Job(case, "fsdp2"))), case, rank, world).parameters
    model = fsdp2(make_model(case))
    optimizer = torch.optim.AdamW(model.parameters(), **vars(HYPER[0]))
    torch.manual_seed(DROPOUT_SEED)
    for t in range(1, case.steps + 1):
        ids, labels = micro_batch(case, t, 0)
        share = len(ids) // world
        mine = slice(rank * share, (rank + 1) * share)
        with rows(len(ids), mine):
            F.cross_entropy(model(ids[mine]), labels[mine]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return all(torch.equal(p.full_tensor(), ours[name]) for name, p in model.named_parameters())


def few_eligible(rank: int, world: int, case: Case) -> Run:
    """Only two weights of one element each may be masked: all but the first rank hold none of them."""
    model = fsdp2(make_model(case))
    options = {**case.rose, "include": ("gate.weight",)}
    stepper = prepare_groups(model, case, **options)
    assert len(stepper.engine.slices) == (2 if rank == 0 and case.strategy != "none" else 0)
    return train(stepper, model, case, rank, world)


def prepare_groups(model: nn.Module, case: Case, **options: Any) -> Any:
    optimizer = rose_ds.RoseAdamW(parameter_groups(case, model, named=True), **options)
    return rose_ds.prepare(model, optimizer, accumulation_steps=case.accumulation, max_grad_norm=case.clip)


def as_accelerate(rank: int, world: int) -> dict[str, Tensor]:
    """Optimizer first, then sharding, then the sharded parameters put into its groups; and an evaluation, which leaves
    the root's parameters unsharded."""
    case = FEW[0]
    model = make_model(case)
    optimizer = rose_ds.RoseAdamW(parameter_groups(case, model, named=True), **case.rose)
    fsdp2(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with torch.no_grad(), rows(2, slice(0, 2)):
        model(micro_batch(case, 1, 0)[0][:2])
    assert any(type(p) is nn.Parameter for p in model.parameters()), "still unsharded"
    stepper = rose_ds.prepare(model, optimizer, accumulation_steps=2, max_grad_norm=case.clip)
    return train(stepper, model, case, rank, world).parameters


def refused(rank: int, world: int) -> dict[str, str]:
    """What prepare() or a step says to each configuration that it refuses."""

    def model() -> Tiny:
        return make_model(Case())

    def while_training(change: Callable[[Any], Any]) -> str:
        wrapped = fsdp2(model())
        stepper = prepare(wrapped)
        change(wrapped)
        return message_of(lambda: train(stepper, wrapped, Case(steps=1), rank, world))

    def ignored() -> Any:
        inner = model()
        return prepare(fully_shard(inner, ignored_params={inner.head.weight}))

    def too_early() -> Any:
        inner = model()
        optimizer = rose_ds.RoseAdamW(inner.named_parameters(), strategy="none")
        return rose_ds.prepare(fsdp2(inner), optimizer)

    def part_of_the_optimizer() -> Any:
        wrapped = fsdp2(model())
        return prepare(wrapped, [(n, p) for n, p in wrapped.named_parameters() if "up" not in n])

    def without_rng() -> Any:
        inner = model()
        inner.layer[1] = checkpoint_wrapper(inner.layer[1], preserve_rng_state=False)
        return prepare(fsdp2(inner))

    def inner_only() -> Any:
        inner = model()
        fully_shard(inner.layer[0])
        return prepare(inner)

    def reduced_in_fp16() -> Any:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float16)
        return prepare(fully_shard(model(), mp_policy=policy))

    return {
        "reduction": message_of(reduced_in_fp16),
        "passes": message_of(
            lambda: prepare(fsdp2(model(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.float16)))
        ),
        "gradient_sync": while_training(lambda m: m.set_requires_gradient_sync(False)),
        "all_reduce": while_training(lambda m: m.set_requires_all_reduce(False)),
        "last_backward": while_training(lambda m: m.set_is_last_backward(False)),
        "reshard": while_training(lambda m: m.set_reshard_after_backward(False)),
        "ignored": message_of(ignored),
        "too_early": message_of(too_early),
        "part": message_of(part_of_the_optimizer),
        "rng": message_of(without_rng),
        "inner": message_of(inner_only),
        "replicate": message_of(lambda: prepare(replicate(model()))),
    }


REFUSALS = {
    "gradient_sync": ("RefusedConfiguration", "set_requires_gradient_sync(False)", "sync_each_batch"),
    "all_reduce": ("RefusedConfiguration", "set_requires_all_reduce(False)", "every micro-batch"),
    "last_backward": ("RefusedConfiguration", "set_is_last_backward(False)", "leave it at True"),
    "passes": ("RefusedConfiguration", "gradients that no loss scale keeps from becoming zero"),
    "reduction": ("RefusedConfiguration", "reduce_dtype=torch.float16", "torch.bfloat16 or torch.float32"),
    "reshard": ("RefusedConfiguration", "set_reshard_after_backward(False)", "leave it at True"),
    "ignored": ("RefusedConfiguration", "head.weight", "freeze"),
    "too_early": ("RefusedConfiguration", "17 tensors", "after sharding"),
    "part": ("RefusedConfiguration", "missing from the optimizer"),
    "rng": ("RefusedConfiguration", "'layer.1'", "fsdp_activation_checkpointing", "gradient_checkpointing=True"),
    "inner": ("TypeError", "layer.0", "FSDPModule", "plain Tiny"),
    "replicate": ("TypeError", "ReplicateModule", "fully_shard"),
}


def gathered_ahead(rank: int, world: int, case: Case) -> list[int]:
    """How often each backward pass of a step, and the probes before it, asked for the model's parts ahead."""
    counts: list[int] = [0]
    wrapped, stepper = start(Job(case, "fsdp2"))
    prefetch, backward = FSDPParamGroup._prefetch_unshard, stepper.engine._backward

    def spy(*arguments: Any) -> None:
        counts[-1] += 1
        prefetch(*arguments)

    def begin(*arguments: Any, **options: Any) -> None:
        backward(*arguments, **options)
        counts.append(0)

    FSDPParamGroup._prefetch_unshard, stepper.engine._backward = staticmethod(spy), begin
    try:
        train(stepper, wrapped, case, rank, world)
    finally:
        FSDPParamGroup._prefetch_unshard = staticmethod(prefetch)
    return counts[:-1]


def everything(rank: int, world: int, jobs: list[Job]) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    results: dict[str, Any] = {"jobs": run_all(rank, world, jobs)}
    if not any(isinstance(run, str) for run in results["jobs"].values()):
        results["risks"] = risks_of_all(rank, world, ["fsdp2", "fsdp2-bf16"])
        results["leak"] = leak(rank, world, "fsdp2")
        results["adamw"] = adamw(rank, world)
        results["few"] = [few_eligible(rank, world, case) for case in ALONE]
        results["accelerate"] = as_accelerate(rank, world)
        results["ahead"] = [gathered_ahead(rank, world, case) for case in AHEAD]
        results["refused"] = refused(rank, world)
    return results


@pytest.fixture(scope="module")
def ranks() -> Callable[[int], list[dict[str, Any]]]:
    """Everything on 2 ranks, in one spawn; remembered."""
    return once(lambda world: run_ranks(everything, world, JOBS + BF16))


def jobs_of(results: list[dict[str, Any]]) -> list[dict[str, Run | str]]:
    return [result["jobs"] for result in results]


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_parity(job: Job, ranks: Any, parity_log: list[str]) -> None:
    """Invariant 1, for fully_shard's settings; weights of one element leave ranks empty."""
    check(jobs_of(ranks(2)), job, parity_log)


@pytest.mark.parametrize("job", BF16, ids=str)
def test_bf16(job: Job, ranks: Any) -> None:
    """bf16 passes with fp32 shards and reduction: the ranks agree, and stay near an fp32 run."""
    runs, twin = runs_of(jobs_of(ranks(2)), job), reference(job.case)
    check_ranks_agree(runs)
    got, want = (
        torch.cat([found[name].flatten() for name in twin.parameters])
        for found in (runs[0].parameters, twin.parameters)
    )
    assert 1e-5 < (got - want).norm() / want.norm() < 0.02


@pytest.mark.parametrize("how", ["fsdp2", "fsdp2-bf16"])
def test_taus(how: str, ranks: Any) -> None:
    """Invariant 2."""
    check_taus([result["risks"] for result in ranks(2)], how)


def test_kl_gradient_leaks_nowhere(ranks: Any) -> None:
    """Invariant 4: keeping everything is AdamW, bit for bit, also with evaluations in between."""
    assert all(result["leak"] for result in ranks(2))


def test_none_is_adamw(ranks: Any) -> None:
    """Invariant 5."""
    assert all(result["adamw"] for result in ranks(2))


def test_a_rank_without_eligible_elements(ranks: Any) -> None:
    """It joins every exchange, and the run is that of one process."""
    for i, case in enumerate(ALONE):
        runs = [result["few"][i] for result in ranks(2)]
        check_ranks_agree(runs)
        model = make_model(case)
        alone = train(prepare_groups(model, case, **{**case.rose, "include": ("gate.weight",)}), model, case)
        for name, want in alone.parameters.items():
            torch.testing.assert_close(runs[0].parameters[name], want, rtol=1e-5, atol=1e-6)
        if case.strategy != "none":
            assert runs[0].reports[0].eligible == 2


def test_every_backward_pass_gathers_ahead(ranks: Any) -> None:
    """Two blocks, in each of three backward passes of both micro-batches; and in a probe before SMART's."""
    for result in ranks(2):
        assert result["ahead"] == [[2] * 6, [4, 2]]


def test_groups_filled_after_sharding(ranks: Any) -> None:
    """As accelerate does it: the same run, bit for bit."""
    for result in ranks(2):
        want = result["jobs"][str(Job(FEW[0], "fsdp2"))].parameters
        assert all(torch.equal(result["accelerate"][name], want[name]) for name in want)


@pytest.mark.parametrize("what", REFUSALS)
def test_refused(what: str, ranks: Any) -> None:
    """Invariant 6: the message names the setting and the way out, on every rank."""
    for result in ranks(2):
        for part in REFUSALS[what]:
            assert part in result["refused"][what], result["refused"][what]


def test_checkpoint_on_other_world_sizes(tmp_path: Path) -> None:
    """Written on 2 ranks and read on 1, 2 and 4 (some empty): the same losses and thresholds, bit for bit."""
    case = replace(BEFORE, two_groups=True)
    want, *others = run_ranks(save, 2, "fsdp2", case, str(tmp_path))
    assert others == [want] and want[1][-1][0] == 2 * case.steps
    for world in (1, 2, 4):
        assert run_ranks(load, world, "fsdp2", case, str(tmp_path)) == [want] * world
