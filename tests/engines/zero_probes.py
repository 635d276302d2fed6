"""What a rank of the invariants' tests does and brings back; each probe runs on every rank."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from reference import Run, train
from tiny import Case, micro_batch, rows
from torch import Tensor
from zero_jobs import Job, start

# --- thresholds ---


@contextlib.contextmanager
def recorded_risks() -> Iterator[list[dict[str, Tensor]]]:
    """This rank's risks of each step, written out from what the engine hands to the selection."""
    import rose_ds.training.masking

    original, steps = rose_ds.training.masking.select, []

    def recording(selectors: Any, granularity: str, inputs: Any, *kernels: Any, **how: Any) -> Any:
        sizes = torch.tensor([g.numel() for g in inputs.grads], dtype=torch.long)
        seen = {"index": torch.tensor(list(inputs.layout.tensor_index)).repeat_interleave(sizes)}
        if inputs.risk_grads is not None:
            seen["first"] = torch.cat([g.abs().float().flatten() for g in inputs.risk_grads] + [torch.zeros(0)])
        if len(selectors) == 2 or inputs.risk_grads is None:
            parts = [torch.zeros(0)]
            for grad, m, beta1 in zip(inputs.grads, inputs.exp_avgs, inputs.beta1s, strict=True):
                risk = ((1 - beta1) * (grad.float() * inputs.scale).abs() / m.abs() - 1).abs()
                parts.append(torch.where(m == 0, torch.zeros_like(risk), risk).flatten())
            seen["second"] = torch.cat(parts)
        steps.append({name: value.clone() for name, value in seen.items()})
        return original(selectors, granularity, inputs, *kernels, **how)

    rose_ds.training.masking.select = recording
    try:
        yield steps
    finally:
        rose_ds.training.masking.select = original


def thresholds(rank: int, world: int, job: Job, method: str) -> tuple[Run, list[dict[str, Tensor]]]:
    """A run and this rank's risks in it."""
    os.environ["ROSE_DS_EXCHANGE"] = method
    try:
        engine, stepper = start(job, world)
    finally:
        del os.environ["ROSE_DS_EXCHANGE"]
    with recorded_risks() as steps:
        run = train(stepper, engine, job.case, rank, world)
    engine.destroy()
    return run, steps


# --- communication ---


class CountingDist:
    """torch.distributed, with the bytes that each collective of a threshold sends written down."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_gather(self, rows_: list[Tensor], mine: Tensor, group: Any = None) -> None:
        self.sent.append(("all_gather", mine.numel() * mine.element_size()))
        dist.all_gather(rows_, mine, group=group)

    def all_reduce(self, mine: Tensor, group: Any = None) -> None:
        self.sent.append(("all_reduce", mine.numel() * mine.element_size()))
        dist.all_reduce(mine, group=group)


def communication(rank: int, world: int, job: Job) -> list[tuple[str, int]]:
    """What a run's thresholds sent."""
    import rose_ds.exchange

    engine, stepper = start(job, world)
    counting = CountingDist()
    rose_ds.exchange.dist = counting
    try:
        train(stepper, engine, job.case, rank, world)
    finally:
        rose_ds.exchange.dist = dist
    engine.destroy()
    return counting.sent


# --- checkpoints ---


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and numbers of a nested structure, by path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("ds_config", "client_optimizer"):
                yield from flatten(inner, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from flatten(inner, f"{path}/{i}")
    elif isinstance(value, (Tensor, bool, int, float)):
        yield path, value


def saved(engine: Any, folder: Path, tag: str) -> dict[str, Any]:
    """Everything in the checkpoint that the engine writes, from all ranks, by file and path."""
    engine.save_checkpoint(str(folder), tag=tag)
    dist.barrier()
    found: dict[str, Any] = {}
    for file in sorted((folder / tag).glob("*.pt")):
        for path, value in flatten(torch.load(file, weights_only=False)):
            found[file.name + path] = value.clone() if isinstance(value, Tensor) else value
    dist.barrier()
    return found


def clear_padding(engine: Any) -> None:
    """Stage 3 leaves the ends of its partitions uninitialised, and writes them into the checkpoint."""
    z = engine.optimizer
    for p in engine.module.parameters() if engine.zero_optimization_stage() == 3 else ():
        sub_group, offset, numel = z.grad_position[z.get_param_id(p)]
        real = min(numel, max(0, p.ds_numel - dist.get_rank() * numel))
        z.fp32_partitioned_groups_flat[sub_group].data[offset + real : offset + numel] = 0


def isolation(rank: int, world: int, job: Job, folder: Path) -> dict[str, Any]:
    """Checkpoints after one and after three steps, and the reports in between."""
    engine, stepper = start(job, world)
    clear_padding(engine)
    one = Case(**{**vars(job.case), "steps": 1})
    two = Case(**{**vars(job.case), "steps": 2})
    first = train(stepper, engine, one, rank, world, reseed=True)
    after_one = saved(engine, folder, "one")
    rest = train(stepper, engine, two, rank, world, first_step=2, reseed=True)
    after_three = saved(engine, folder, "three")
    engine.destroy()
    return {"one": after_one, "three": after_three, "reports": first.reports + rest.reports, "run": rest}


# --- gradients that are not finite ---


def broken_step(rank: int, world: int, job: Job, what: str) -> dict[str, Any]:
    """Three steps, the second with a NaN on the last rank: in the task loss, or in the second pass only."""
    engine, stepper = start(job, world)
    states: list[dict[str, Tensor]] = []
    reports = []
    torch.manual_seed(5)
    for t in (1, 2, 3):
        ids, labels = micro_batch(job.case, t, 0)
        share = len(ids) // world
        mine = slice(rank * share, (rank + 1) * share)
        broken = t == 2 and rank == world - 1
        passes = 0

        def forward(ids: Tensor = ids, mine: slice = mine, broken: bool = broken) -> Tensor:
            nonlocal passes
            passes += 1
            logits = engine(ids[mine])
            return logits * float("inf") if broken and what == "kl" and passes == 2 else logits

        def loss(logits: Tensor, labels: Tensor = labels, mine: slice = mine, broken: bool = broken) -> Tensor:
            value = F.cross_entropy(logits, labels[mine])
            return value * float("nan") if broken and what == "loss" else value

        with rows(len(ids), mine):
            stepper.backward(forward, loss)
            reports.append(stepper.step())
        states.append({**stepper.gather_parameters(), **_optimizer_state(stepper)})
    engine.destroy()
    return {"reports": reports, "states": states}


def _optimizer_state(stepper: Any) -> dict[str, Tensor]:
    return {
        f"{i}/{name}": value.detach().clone()
        for i, state in enumerate(stepper.optimizer.state.values())
        for name, value in state.items()
    }


# --- all of it ---

Probe = tuple[str, Callable[..., Any], tuple[Any, ...]]


def probe_all(rank: int, world: int, probes: list[Probe]) -> dict[str, Any]:
    """The results of the probes by name."""
    return {name: probe(rank, world, *args) for name, probe, args in probes}
