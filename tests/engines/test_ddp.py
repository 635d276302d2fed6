"""DistributedDataParallel: the twin's parameters, one more all-reduce a step, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from reference import Run, train
from spawn import run_ranks
from tiny import DIM, VOCABULARY, Case, make_model, micro_batch, parameter_groups
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch_jobs import (
    EXTRAS,
    FEW,
    Job,
    check,
    check_runs,
    check_taus,
    leak,
    mesh_2d,
    message_of,
    once,
    prepare,
    risks_of_all,
    run_all,
    start,
)

import rose_ds
from rose_ds import RefusedConfiguration, RoseAdamW
from rose_ds.engines.torch import ddp as ddp_engine
from rose_ds.objectives import RDrop

#: test_methods.py has every strategy
JOBS = [
    *(Job(case, "ddp") for case in EXTRAS),
    *(Job(case, how) for how in ("ddp", "ddp-bucket-views", "ddp-find-unused") for case in FEW),
]


class Odd(nn.Module):
    """Its passes use different parameters; and DDP broadcasts its index buffer before a pass."""

    position_ids: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.positions = nn.Embedding(VOCABULARY, DIM), nn.Embedding(5, DIM)
        self.layer = nn.ModuleList([nn.Linear(DIM, DIM) for _ in range(2)])
        self.head = nn.Linear(DIM, 3)
        self.register_buffer("position_ids", torch.arange(5))

    def forward(self, ids: Tensor, noise: Tensor, branch: int) -> Tensor:
        x = (self.embeddings(ids) + self.positions(self.position_ids)).mean(1) * noise
        return self.head(torch.tanh(self.layer[branch](x)))


def train_odd(wrap: Callable[[nn.Module], nn.Module], rank: int, world: int) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model = wrap(Odd())
    optimizer = rose_ds.RoseAdamW(model.named_parameters(), lr=1e-2, strategy="first")
    stepper = rose_ds.prepare(model, optimizer, accumulation_steps=2, max_grad_norm=0.5)
    for t in range(1, 5):
        for micro in range(2):
            ids, labels = micro_batch(Case(accumulation=2), t, micro)
            share = len(ids) // world
            mine = slice(rank * share, (rank + 1) * share)
            branches = iter([t % 2, 1 - t % 2])

            def forward(ids: Tensor = ids, mine: slice = mine, branches: Any = branches) -> Tensor:
                noise = F.dropout(torch.ones(len(ids), DIM), 0.2)
                return model(ids[mine], noise[mine], next(branches))

            stepper.backward(forward, lambda z, y=labels[mine]: F.cross_entropy(z, y))
            stepper.step()
    return stepper.gather_parameters()


def bucketed_means(rank: int, world: int) -> tuple[list[Tensor], list[int]]:
    """Means of tensors of which two share memory, and how many elements each all-reduce carried."""
    carried: list[int] = []
    reduce, limit = dist.all_reduce, ddp_engine._BUCKET

    def spy(tensor: Tensor, **options: Any) -> Any:
        carried.append(tensor.numel())
        return reduce(tensor, **options)

    shared = torch.arange(3.0) + rank
    dist.all_reduce, ddp_engine._BUCKET = spy, 40
    try:
        sizes = [4, 6, 1, 20, 2]
        tensors = [torch.full((n,), float(n * (rank + 1))) for n in sizes]
        return ddp_engine._Means([shared, shared, *tensors], dist.group.WORLD).wait(), carried
    finally:
        dist.all_reduce, ddp_engine._BUCKET = reduce, limit


def order_of_a_step(rank: int, world: int) -> list[str]:
    """What starts, one after the other, in a step of two micro-batches."""
    order: list[str] = []
    case = Case("first", accumulation=2, steps=1)
    wrapped, stepper = start(Job(case, "ddp"))
    reduce, pull = dist.all_reduce, stepper.engine.pull

    def all_reduce(tensor: Tensor, **options: Any) -> Any:
        order.append("reduction of the KL gradient")
        return reduce(tensor, **options)

    def task(pulls: Any, *, more: bool) -> None:
        order.append("task gradient")
        pull(pulls, more=more)

    dist.all_reduce, stepper.engine.pull = all_reduce, task
    try:
        train(stepper, wrapped, case, rank, world)
    finally:
        dist.all_reduce = reduce
    return order


def synchronised_each_time(rank: int, world: int) -> Run:
    """A loop that counts micro-batches itself and leaves no_sync() out, as Trainer's does under DDP on one rank."""
    wrapped, stepper = start(Job(replace(FEW[0], accumulation=1), "ddp"))
    stepper.engine.accumulation_steps = FEW[0].accumulation
    return train(stepper, wrapped, FEW[0], rank, world)


def through_accelerate(rank: int, world: int) -> dict[str, Tensor]:
    """accelerate's DDP module and AcceleratedOptimizer, inside what torch.compile returns."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    case = FEW[0]
    model = make_model(case)
    optimizer = rose_ds.RoseAdamW(parameter_groups(case, model, named=True), **case.rose)
    wrapped, wrapped_optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(wrapped, DistributedDataParallel) and not isinstance(wrapped_optimizer, rose_ds.RoseAdamW)
    compiled = torch.compile(wrapped)
    stepper = rose_ds.prepare(
        compiled, wrapped_optimizer, accumulation_steps=case.accumulation, max_grad_norm=case.clip
    )
    assert type(compiled) is not DistributedDataParallel and stepper.engine.name == "ddp"
    parameters = train(stepper, wrapped, case, rank, world).parameters
    wrapped_optimizer.scaler = object()
    assert "fp16" in message_of(lambda: rose_ds.prepare(wrapped, wrapped_optimizer))
    return parameters


def refused(rank: int, world: int) -> dict[str, str]:
    """What prepare() or a step says to each configuration that it refuses."""
    ddp = DistributedDataParallel

    def model() -> nn.Module:
        return make_model(Case())

    def ignored() -> Any:
        inner = model()
        ddp._set_params_and_buffers_to_ignore_for_model(inner, ["head.weight"])
        return prepare(ddp(inner))

    def stranger() -> Any:
        named = [*(m := ddp(model())).named_parameters(), ("layer.extra.weight", nn.Parameter(torch.ones(2)))]
        return prepare(m, named)

    def joined() -> Any:
        wrapped = ddp(model())
        stepper = prepare(wrapped)
        with wrapped.join():
            train(stepper, wrapped, Case(steps=1))

    def inside_no_sync() -> Any:
        wrapped = ddp(model())
        stepper = prepare(wrapped)
        with wrapped.no_sync():
            train(stepper, wrapped, Case(steps=1))

    def mixed_precision() -> Any:
        wrapped = ddp(model())
        wrapped.mixed_precision = object()  # as its argument would set it
        return prepare(wrapped)

    def without_rng() -> Any:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        inner = model()
        inner.layer[0] = checkpoint_wrapper(inner.layer[0], preserve_rng_state=False)
        return prepare(ddp(inner))

    def dtensors() -> Any:
        from torch.distributed.tensor import distribute_tensor

        inner = model()
        mesh = mesh_2d("replicate", "shard")["shard"]
        inner.head.weight = nn.Parameter(distribute_tensor(inner.head.weight.detach(), mesh))
        return rose_ds.engines.torch.plain.PlainEngine(inner, rose_ds.RoseAdamW(inner.named_parameters()), 1, None)

    def inner_only() -> Any:
        inner = model()
        inner.layer[0] = ddp(inner.layer[0])
        return prepare(inner)

    def hooked() -> Any:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        case = Case("second", objective=RDrop(), steps=1)
        messages = []
        for now in (case, Case(steps=1)):  # an exact risk beside the task alone is reduced by itself
            wrapped = ddp(make_model(now))
            optimizer = RoseAdamW(wrapped.named_parameters(), **now.rose)
            stepper = rose_ds.prepare(wrapped, optimizer, objective=now.objective)
            wrapped.register_comm_hook(None, fp16_compress_hook)
            messages.append(message_of(lambda s=stepper, w=wrapped, c=now: train(s, w, c)))
        assert messages[1] == "", messages[1]
        raise RefusedConfiguration(messages[0])

    def python_reducer() -> Any:
        wrapped = ddp(model())
        wrapped._use_python_reducer = True
        return prepare(wrapped)

    return {
        "mixed_precision": message_of(mixed_precision),
        "hook": message_of(hooked),
        "python_reducer": message_of(python_reducer),
        "static_graph": message_of(lambda: prepare(ddp(model(), static_graph=True))),
        "ignored": message_of(ignored),
        "stranger": message_of(stranger),
        "join": message_of(joined),
        "no_sync": message_of(inside_no_sync),
        "rng": message_of(without_rng),
        "dtensor": message_of(dtensors),
        "plain": message_of(lambda: prepare(model())),
        "inner": message_of(inner_only),
        "DataParallel": message_of(lambda: prepare(nn.DataParallel(model()))),
    }


REFUSALS = {
    "mixed_precision": ("RefusedConfiguration", "mixed_precision", "torch.autocast"),
    "hook": ("RefusedConfiguration", "communication hook", "leave the hook out"),
    "python_reducer": ("RefusedConfiguration", "python_reducer", "before the model is wrapped"),
    "static_graph": ("RefusedConfiguration", "static_graph=False"),
    "ignored": ("RefusedConfiguration", "head.weight", "freeze"),
    "stranger": ("RefusedConfiguration", "not parameters of the DDP module"),
    "join": ("RefusedConfiguration", "join()", "same number of batches"),
    "no_sync": ("RefusedConfiguration", "no_sync()", "accumulation_steps"),
    "rng": ("RefusedConfiguration", "'layer.0'", "preserve_rng_state=True"),
    "dtensor": ("RefusedConfiguration", "head.weight", "fully_shard"),
    "plain": ("TypeError", "Tiny", "DistributedDataParallel", "fully_shard"),
    "inner": ("TypeError", "layer.0", "DistributedDataParallel"),
    "DataParallel": ("TypeError", "DataParallel is not supported"),
}


def everything(rank: int, world: int, jobs: list[Job]) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    results: dict[str, Any] = {"jobs": run_all(rank, world, jobs)}
    if not any(isinstance(run, str) for run in results["jobs"].values()):
        results["risks"] = risks_of_all(rank, world, ["ddp"])
        results["leak"] = leak(rank, world, "ddp")
        results["odd"] = train_odd(lambda m: DistributedDataParallel(m, find_unused_parameters=True), rank, world)
        results["means"] = bucketed_means(rank, world)
        results["order"] = order_of_a_step(rank, world)
        results["synchronised"] = synchronised_each_time(rank, world)
        results["accelerate"] = through_accelerate(rank, world)
        results["refused"] = refused(rank, world)
    return results


@pytest.fixture(scope="module")
def ranks() -> Callable[[int], list[dict[str, Any]]]:
    """Everything on 2 ranks, in one spawn; remembered."""
    return once(lambda world: run_ranks(everything, world, JOBS))


def jobs_of(results: list[dict[str, Any]]) -> list[dict[str, Run | str]]:
    return [result["jobs"] for result in results]


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_parity(job: Job, ranks: Any, parity_log: list[str]) -> None:
    """Invariant 1, for what else can change a step and for DDP's settings."""
    check(jobs_of(ranks(2)), job, parity_log)


def test_taus(ranks: Any) -> None:
    """Invariant 2; replicas count once."""
    check_taus([result["risks"] for result in ranks(2)], "ddp")


def test_kl_gradient_leaks_nowhere(ranks: Any) -> None:
    """Invariant 4: keeping everything is AdamW, bit for bit."""
    assert all(result["leak"] for result in ranks(2))


def test_passes_that_use_other_parameters(ranks: Any) -> None:
    """Unused parameters are those of the first pass."""
    alone = train_odd(lambda m: m, 0, 1)
    for result in ranks(2):
        for name, want in alone.items():
            torch.testing.assert_close(result["odd"][name], want, rtol=1e-5, atol=1e-6)


def test_buckets(ranks: Any) -> None:
    """The KL gradient travels in few, bounded pieces, and a tensor that appears twice is averaged twice."""
    for means, carried in (result["means"] for result in ranks(2)):
        assert carried == [10, 7, 20, 2]
        assert [m.tolist() for m in means[:2]] == [[0.5, 1.5, 2.5]] * 2
        assert [m.unique().tolist() for m in means[2:]] == [[6.0], [9.0], [1.5], [30.0], [3.0]]


def test_reduced_while_the_task_gradient_is_taken(ranks: Any) -> None:
    """Of both micro-batches together, once."""
    for result in ranks(2):
        assert result["order"][:3] == ["task gradient", "reduction of the KL gradient", "task gradient"]
        assert result["order"].count("reduction of the KL gradient") == 1


def test_synchronised_each_time(ranks: Any, parity_log: list[str]) -> None:
    """Invariant 1 where DDP reduces in every micro-batch of a step."""
    assert FEW[0].accumulation > 1
    check_runs([result["synchronised"] for result in ranks(2)], FEW[0], "ddp, synchronised each time", parity_log)


def test_accelerate(ranks: Any) -> None:
    """What accelerate and torch.compile return is unwrapped, and gives the same run."""
    results = ranks(2)
    for result in results:
        want = result["jobs"][str(Job(FEW[0], "ddp"))].parameters
        assert all(torch.allclose(result["accelerate"][name], want[name], rtol=1e-6) for name in want)


@pytest.mark.parametrize("what", REFUSALS)
def test_refused(what: str, ranks: Any) -> None:
    """Invariant 6: the message names the setting and the way out, on every rank."""
    for result in ranks(2):
        for part in REFUSALS[what]:
            assert part in result["refused"][what], result["refused"][what]
