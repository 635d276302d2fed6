"""What it takes to compare an engine with ``rose_ds.reference``, the single-process twin.

An engine runs a case through ``train``, with the same weights, batches and random numbers (see ``tiny``), so its
parameters must come out the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import tiny
import torch
import torch.nn.functional as F
from tiny import DROPOUT_SEED, FISHER_CLIP, FISHER_STEPS, HYPER, Case, group_of, make_model, micro_batch, rows
from torch import Tensor

from rose_ds import Sample
from rose_ds.config import RoseConfig
from rose_ds.reference import Reference, Step


@dataclass
class Twin:
    """The run of the twin."""

    parameters: dict[str, Tensor]
    steps: list[Step]
    stream: Tensor
    """Random numbers drawn after the last step."""
    rounding: float
    """Relative rounding error of its scores."""
    once: Step | None = None
    """What a mask that was found before the first step saw."""


@cache
def reference(case: Case, segments: tuple[tuple[int, int], ...] = ()) -> Twin:
    """The case in one process, fp32.

    Args:
        segments: (first step, number of steps) of each part of a run that was interrupted, which draws its random
            numbers anew; default: one part.
    """
    model = make_model(case)
    run = Reference(model, RoseConfig(**case.rose), case.objective, lambda name: HYPER[group_of(case, name)], case.clip)

    def closures(step: int, micro: int) -> tuple[Any, Any]:
        ids, labels = micro_batch(case, step, micro)
        return lambda: model(ids), lambda logits: F.cross_entropy(logits, labels)

    def some_of(step: int, micro: int) -> tuple[Tensor, Any]:
        ids, _ = micro_batch(case, step, micro)
        picked = torch.arange(0, len(ids), 2)

        def forward() -> Tensor:
            with rows(len(picked), slice(0, len(picked))):
                return model(ids[picked])

        return picked, forward

    size, steps = case.batch // case.accumulation, []
    with rows(size, slice(0, size)):
        for first, count in segments or ((1, case.steps),):
            torch.manual_seed(DROPOUT_SEED)
            if case.strategy == "child-tuning" and run.static is None:
                run.fisher_pass((closures(t, 0) for t in FISHER_STEPS), FISHER_CLIP)
            once = run.static[0] if run.static else None
            for t in range(first, first + count):
                some = [some_of(t, i) for i in range(case.accumulation)] if case.sampled else []
                steps.append(run.step([closures(t, i) for i in range(case.accumulation)], some))
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    # R-Drop's task gradient, and a risk of two halves, are differences of larger gradients
    r_drop = case.objective.name == "r-drop" and case.strategy in ("second", "ensemble")
    rounding = 2e-4 if r_drop or case.first_order == "halves" else 2e-5
    return Twin(parameters, steps, torch.rand(4), rounding, once)


# --- an engine's run of the same case, and the comparison ---


@dataclass
class Run:
    """What an engine made of a case, on one rank."""

    parameters: dict[str, Tensor]
    reports: list[Any]
    losses: list[float]
    stream: Tensor


def train(
    stepper: Any,
    model: Callable[[Tensor], Tensor],
    case: Case,
    rank: int = 0,
    world: int = 1,
    *,
    first_step: int = 1,
    reseed: bool = False,
) -> Run:
    """Run ``case`` through a Stepper on this rank's rows.

    Args:
        model: the wrapped module, called with ids.
        first_step: number of the first step's batch.
        reseed: seed each micro-batch anew, so that first passes are the same with and without a second pass.
    """
    reports, losses = [], []
    torch.manual_seed(DROPOUT_SEED)

    def closures(ids: Tensor, labels: Tensor, mine: slice) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
        ids, labels = ids[mine].to(tiny.DEVICE), labels[mine].to(tiny.DEVICE)
        return lambda: model(ids), lambda logits: F.cross_entropy(logits.float(), labels)

    def share_of(ids: Tensor) -> slice:
        share = len(ids) // world
        return slice(rank * share, (rank + 1) * share)

    def sample(ids: Tensor, mine: slice) -> Sample | None:
        """Every other row of this rank's."""
        if not case.sampled:
            return None
        of_rank = ids[mine].to(tiny.DEVICE)
        assert len(of_rank) % 2 == 0, "every other row of the global batch"
        picked, total = torch.arange(0, len(of_rank), 2), len(ids) // 2
        share = slice(rank * len(picked), (rank + 1) * len(picked))

        def forward() -> Tensor:
            with rows(total, share):
                return model(of_rank[picked])

        return Sample(forward, picked)

    if stepper.needs_fisher_pass:
        size = case.batch // case.accumulation
        batches = [micro_batch(case, t, 0) for t in FISHER_STEPS]
        with rows(size, share_of(batches[0][0])):
            stepper.fisher_pass((closures(*batch, share_of(batch[0])) for batch in batches), FISHER_CLIP)
    for t in range(first_step, first_step + case.steps):
        for micro in range(case.accumulation):
            ids, labels = micro_batch(case, t, micro)
            mine = share_of(ids)
            if reseed:
                torch.manual_seed(DROPOUT_SEED + 10 * t + micro)
            with rows(len(ids), mine):
                values = stepper.backward(*closures(ids, labels, mine), sample=sample(ids, mine))
                report = stepper.step()
            losses.append(values["loss"].item())
            assert (report is not None) == (micro == case.accumulation - 1), "a report at the boundary and only there"
        reports.append(report)
    stream = torch.rand(4)
    parameters = {name: p.detach().float().cpu().clone() for name, p in stepper.gather_parameters().items()}
    return Run(parameters, reports, losses, stream)


@dataclass(frozen=True)
class Comparison:
    """How far an engine's parameters are from the twin's."""

    error: float
    """Relative error of the whole vector."""
    near_tau: int
    """Elements (or tensors) whose risk lay, in some step, within rounding of tau without being the one that set it."""
    ranked: int
    """How many risks were ranked in all steps together."""
    differing: int
    """Elements that differ by more than rounding."""

    def __str__(self) -> str:
        return (
            f"relative error {self.error:.1e}, {self.differing} elements differ, "
            f"{self.near_tau} of {self.ranked} risks within rounding of tau"
        )


def near_tau(twin: Twin) -> tuple[int, int]:
    """How many risks lie within rounding of tau but are not tau, and how many there are. A risk of Eq. 4 is the
    difference of two numbers near 1, so its rounding error is that of 1, not its own."""
    near = ranked = 0
    for step in [*twin.steps, *([twin.once] if twin.once else [])]:
        for order, risks in step.scores.items():
            every = torch.cat([r.flatten() for r in risks.values()])
            gap = (every - step.tau[order]).abs()
            scale = step.tau[order] if order == "first" else max(step.tau[order], 1.0)
            near += int(((gap > 0) & (gap <= twin.rounding * scale)).sum())
            ranked += every.numel()
    return near, ranked


def compare(parameters: dict[str, Tensor], twin: Twin) -> Comparison:
    """Compare an engine's full parameters with the twin's."""
    assert list(parameters) == list(twin.parameters), "gather_parameters() gives the unwrapped names, in order"
    got = torch.cat([parameters[name].flatten() for name in twin.parameters]).double()
    want = torch.cat([p.flatten() for p in twin.parameters.values()]).double()
    difference = got - want
    error = (difference.norm() / want.norm()).item()
    return Comparison(error, *near_tau(twin), int((difference.abs() > 1e-5).sum()))


def check_parity(parameters: dict[str, Tensor], twin: Twin, tolerance: float = 1e-5) -> Comparison:
    """Invariant 1: below ``tolerance``, unless risks within rounding of tau changed sides; then few elements moved.

    An element that was masked the other way moves by a whole step, and others with it in the steps after.
    """
    found = compare(parameters, twin)
    assert found.near_tau <= 0.002 * found.ranked + 1, f"too many near ties to compare anything: {found}"
    if found.error >= tolerance:
        assert found.near_tau > 0, f"no risk was near tau, so nothing explains it: {found}"
        assert found.error < 1e-3 and found.differing < 0.02 * sum(p.numel() for p in parameters.values()), str(found)
    return found
