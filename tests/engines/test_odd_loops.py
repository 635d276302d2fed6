"""What loops of one's own do beside the usual: a noisy loss, an evaluation between backward() and step(), checkpoints
inside forward(). Every engine does what one process does, or refuses.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_jobs
import zero_jobs
from spawn import run_each, run_ranks
from tiny import Case, Tiny, make_model, micro_batch, parameter_groups, rows
from torch import Tensor, nn
from torch.distributed.fsdp import ShardingStrategy
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from rose_ds import RoseAdamW, prepare
from rose_ds.errors import RefusedConfiguration
from rose_ds.objectives import RDrop, Smart

FULL, GRAD, NONE = ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD
WRAPPERS: dict[str, Any] = {
    "plain": lambda model: model,
    "ddp": torch_jobs.ddp,
    "fsdp1": lambda model: torch_jobs.fsdp1(model, FULL, use_orig_params=True),
    "fsdp1-grad": lambda model: torch_jobs.fsdp1(model, GRAD, use_orig_params=False),
    "fsdp1-whole": lambda model: torch_jobs.fsdp1(model, NONE, use_orig_params=True),
    "fsdp2": torch_jobs.fsdp2,
}
NORM = Case("none", accumulation=1, steps=3, clip=0.0)
FIRST = replace(NORM, strategy="first")


class Reentrant(Tiny):
    """Checkpoints its first block inside forward(), where only the graph shows it."""

    options: dict[str, Any] = {"use_reentrant": True}

    def forward(self, ids: Tensor) -> Tensor:
        x = self.dropout(self.embeddings(ids).mean(1))
        for i, block in enumerate(self.layer):
            x = self.first(block, x) if i == 0 else block(x)
        return 0.7 * self.head(x)

    def first(self, block: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(block, x, **self.options)
        return found


class ByDeepSpeed(Reentrant):
    """The same with DeepSpeed's function."""

    def first(self, block: nn.Module, x: Tensor) -> Tensor:
        from deepspeed import checkpointing

        found: Tensor = checkpointing.checkpoint(block, x)
        return found


class Selective(Reentrant):
    """Keeps some of what it computes."""

    options = {
        "use_reentrant": False,
        "context_fn": lambda: create_selective_checkpoint_contexts([torch.ops.aten.addmm.default]),
    }


@dataclass(frozen=True)
class Loop:
    """A loop over ``tiny``: what is odd about it, and its engine."""

    case: Case
    engine: str
    noisy_loss: bool = False
    evaluates: bool = False
    """Between backward() and step(), and again after it."""
    leaves_step: bool = False
    """It calls optimizer.step() itself."""
    model: type[Tiny] = Tiny

    def __str__(self) -> str:
        odd = "noisy" if self.noisy_loss else "evaluates" if self.evaluates else self.model.__name__
        odd += "-leaves-step" * self.leaves_step
        return f"{self.engine}-{self.case.objective.name}-{self.case.strategy}-{odd}"


@dataclass
class Trace:
    """What a loop came to."""

    weights: dict[str, Tensor]
    norms: list[float]
    taus: list[float]
    evaluations: list[Tensor]
    random: float
    """The next number of the stream that dropout draws from."""


def follow(loop: Loop, rank: int = 0, world: int = 1) -> Trace | str:
    """The loop on this rank; or the message of its refusal."""
    case = loop.case
    torch.manual_seed(7)
    model = loop.model(case)
    model.load_state_dict(make_model(case).state_dict())
    if loop.engine.startswith("zero"):
        call, stepper = zero_jobs.start(zero_jobs.Job(case, int(loop.engine[4])), world, model)
    else:
        call = WRAPPERS[loop.engine](model)
        optimizer = RoseAdamW(parameter_groups(case, call, named=True), **case.rose)
        stepper = prepare(call, optimizer, objective=case.objective)
    norms, taus, evaluations = [], [], []
    for t in range(1, case.steps + 1):
        ids, labels = micro_batch(case, t, 0)
        size = len(ids) // world
        mine = slice(rank * size, (rank + 1) * size)

        def loss(logits: Tensor, labels: Tensor = labels[mine]) -> Tensor:
            value = F.cross_entropy(logits, labels)
            return value * (0.5 + torch.rand(())) if loop.noisy_loss else value

        def evaluate(ids: Tensor = ids) -> None:
            model.eval()
            with torch.no_grad():
                evaluations.append(call(ids).float())
            model.train()

        torch.manual_seed(100 * t)
        with rows(len(ids), mine):
            try:
                stepper.backward(lambda ids=ids[mine]: call(ids), loss)
            except RefusedConfiguration as error:
                return str(error)
            if loop.leaves_step:
                stepper.leave_step_to_optimizer(last=True)
            if loop.evaluates:
                evaluate()
            if loop.leaves_step:
                stepper.optimizer.step()
                stepper.optimizer.zero_grad()
            report = stepper.last_report if loop.leaves_step else stepper.step()
            if loop.evaluates:
                evaluate()
        norms += [] if report.grad_norm is None else [report.grad_norm]
        taus += [] if report.tau_first is None else [report.tau_first]
    return Trace(stepper.gather_parameters(), norms, taus, evaluations, float(torch.rand(())))


def follow_all(rank: int, world: int, loops: list[Loop]) -> dict[str, Trace | str]:
    return run_each(rank, loops, lambda loop: follow(loop, rank, world))


SHARDED = ["fsdp1", "fsdp1-grad", "fsdp2", "zero3"]
EXACT = [
    *(Loop(replace(NORM, objective=RDrop()), engine, noisy_loss=True) for engine in ["ddp", "zero2", *SHARDED]),
    *(Loop(FIRST, engine, noisy_loss=True) for engine in SHARDED),
    *(Loop(NORM, engine, evaluates=True) for engine in ["ddp", "zero1", "zero2", *SHARDED]),
    *(Loop(replace(FIRST, objective=RDrop()), engine, evaluates=True) for engine in SHARDED),
    *(Loop(FIRST, engine, evaluates=True, leaves_step=True) for engine in ["ddp", "fsdp1", "fsdp1-grad", "fsdp2"]),
    *(Loop(replace(NORM, objective=Smart()), engine) for engine in ["fsdp1-whole", "fsdp1", "fsdp2"]),
    *(Loop(FIRST, engine, model=Reentrant) for engine in ["fsdp1", "fsdp2", "zero1", "zero3"]),
    Loop(FIRST, "zero3", model=ByDeepSpeed),
]
REFUSED = [
    *(Loop(FIRST, engine, model=Reentrant) for engine in ["ddp", "zero2"]),
    *(Loop(FIRST, engine, model=ByDeepSpeed) for engine in ["ddp", "fsdp2", "zero0", "zero1", "zero2"]),
]


@pytest.fixture(scope="module")
def ranks(extensions: Any) -> list[dict[str, Trace | str]]:
    return run_ranks(follow_all, 2, [*EXACT, *REFUSED])


@pytest.mark.parametrize("loop", EXACT, ids=str)
def test_two_ranks_do_what_one_process_does(loop: Loop, ranks: Any) -> None:
    twin = follow(replace(loop, engine="plain", model=Tiny))
    assert isinstance(twin, Trace)
    for found in ranks:
        trace = found.get(str(loop))
        assert isinstance(trace, Trace), trace
        assert trace.norms == pytest.approx(twin.norms, rel=1e-4)
        assert trace.taus == pytest.approx(twin.taus, rel=1e-3)
        assert trace.random == twin.random, "passes drew more numbers, or fewer"
        for a, b in zip(trace.evaluations, twin.evaluations, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        differ = sum(int((~torch.isclose(p, twin.weights[n], atol=1e-4)).sum()) for n, p in trace.weights.items())
        assert differ <= (2 if twin.taus else 0), "of the weights whose risk is the threshold some fall on either side"


@pytest.mark.parametrize("loop", REFUSED, ids=str)
def test_checkpoints_that_hide_weights(loop: Loop, ranks: Any) -> None:
    for found in ranks:
        message = found.get(str(loop))
        assert isinstance(message, str) and "use_reentrant=False" in message
        assert ("deepspeed" in message) is (loop.model is ByDeepSpeed)


@pytest.mark.fast
def test_checkpoints_in_one_process() -> None:
    """Refused where a gradient is found apart, by Child-Tuning's look at the data too; else trained as without."""
    for case in (FIRST, replace(FIRST, first_order="fast"), replace(NORM, strategy="second", objective=RDrop())):
        for model, words in ((Reentrant, "hides weights"), (Selective, "checkpoints selectively")):
            refused = follow(Loop(case, "plain", model=model))
            one_pull = case.first_order == "fast" and model is Selective
            assert isinstance(refused, Trace) if one_pull else isinstance(refused, str) and words in refused, refused
    for model in (Reentrant, Selective):
        found = follow(Loop(replace(NORM, strategy="second"), "plain", model=model))
        twin = follow(Loop(replace(NORM, strategy="second"), "plain"))
        assert isinstance(found, Trace) and isinstance(twin, Trace)
        assert all(torch.equal(p, twin.weights[n]) for n, p in found.weights.items())
    model = Reentrant(NORM)
    stepper = prepare(model, RoseAdamW(model.named_parameters(), strategy="child-tuning", keep_first=0.3))
    ids, labels = micro_batch(NORM, 1, 0)
    with rows(len(ids), slice(0, len(ids))), pytest.raises(RefusedConfiguration, match="hides weights"):
        stepper.fisher_pass([(lambda: model(ids), lambda z: F.cross_entropy(z, labels))])


class Normalised(Tiny):
    """BatchNorm inside a checkpoint."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        for block in self.layer:
            block.LayerNorm = nn.BatchNorm1d(block.LayerNorm.normalized_shape[0])


def statistics(case: Case) -> tuple[int, Tensor]:
    """Of the first block's BatchNorm after a micro-batch."""
    torch.manual_seed(0)
    model = Normalised(case)
    stepper = prepare(model, RoseAdamW(model.named_parameters(), **case.rose))
    ids, labels = micro_batch(case, 1, 0)
    torch.manual_seed(1)
    with rows(len(ids), slice(0, len(ids))):
        stepper.backward(lambda: model(ids), lambda z: F.cross_entropy(z, labels))
    norm: Any = model.layer[0].LayerNorm
    return int(norm.num_batches_tracked), norm.running_var.clone()


@pytest.mark.fast
def test_recomputed_statistics_move_as_without_a_mask() -> None:
    """A pass counts once, and again where the task's gradient recomputes it, as in torch; what is ranked does not."""
    counts = {}
    for strategy in ("none", "first"):
        for checkpointing in (False, True):
            counts[strategy, checkpointing] = statistics(replace(NORM, strategy=strategy, checkpointing=checkpointing))
    for checkpointing, count in ((False, 1), (True, 2)):
        (plain, variance), (masked, other) = counts["none", checkpointing], counts["first", checkpointing]
        assert plain == masked == count
        torch.testing.assert_close(variance, other)


@pytest.mark.fast
def test_parameters_that_were_replaced() -> None:
    """Neither would train the new one; and the old one's risk of 0 would take the place of others'."""
    model = make_model(FIRST)
    stepper = prepare(model, RoseAdamW(model.named_parameters(), **FIRST.rose))
    model.layer[0].up.weight = nn.Parameter(torch.zeros_like(model.layer[0].up.weight))
    ids, labels = micro_batch(FIRST, 1, 0)
    with (
        rows(len(ids), slice(0, len(ids))),
        pytest.raises(RefusedConfiguration, match="up.weight' came after"),
    ):
        stepper.backward(lambda: model(ids), lambda z: F.cross_entropy(z, labels))
    stepper.optimizer.add_param_group({"params": [("layer.0.up.weight", model.layer[0].up.weight)]})
    with rows(len(ids), slice(0, len(ids))):
        stepper.backward(lambda: model(ids), lambda z: F.cross_entropy(z, labels))


def counted_loss(rank: int, world: int, engine: str) -> str:
    """What becomes of a loss that is another one whenever it is asked for, where passes run again."""
    counter = itertools.count(1)
    model = make_model(FIRST)
    if engine == "zero3":
        call, stepper = zero_jobs.start(zero_jobs.Job(FIRST, 3), world, model)
    else:
        call = WRAPPERS[engine](model)
        stepper = prepare(call, RoseAdamW(parameter_groups(FIRST, call, named=True), **FIRST.rose))
    ids, labels = micro_batch(FIRST, 1, 0)
    with rows(len(ids), slice(0, len(ids))):
        return torch_jobs.message_of(
            lambda: stepper.backward(lambda: call(ids), lambda z: F.cross_entropy(z, labels) * next(counter))
        )


@pytest.mark.parametrize("engine", ["fsdp1", "zero3"])
def test_a_loss_that_is_not_the_same_again(engine: str, extensions: Any) -> None:
    for message in run_ranks(counted_loss, 2, engine):
        assert "when that was replayed: it must depend only on" in message
