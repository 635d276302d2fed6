"""A single-process twin of Algorithm 1 that reads like the paper, and what it takes to compare an engine with it.

Nothing of rose_ds is used for the twin. An engine runs the same case through ``train``, with the same weights, batches
and dropout masks (see ``tiny``), so its parameters must come out the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from tiny import DROPOUT_SEED, HYPER, Case, group_of, make_model, micro_batch, rows
from torch import Tensor

# --- the paper ---


@dataclass
class TwinStep:
    """What Algorithm 1 saw in one step: thresholds, kept counts, and risks by eligible name."""

    loss: float
    grad_norm: float
    kl: float | None = None
    tau: dict[str, float] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    risks: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@dataclass
class Twin:
    """The run of the twin."""

    parameters: dict[str, Tensor]
    steps: list[TwinStep]
    stream: Tensor
    """Random numbers drawn after the last step."""


def kl_both_ways(a: Tensor, b: Tensor) -> Tensor:
    """Eq. 1, written out."""
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    there = (log_p.exp() * (log_p - log_q)).sum(-1)
    back = (log_q.exp() * (log_q - log_p)).sum(-1)
    return (there + back).mean()


def magnitude(case: Case, x: Tensor) -> Tensor:
    """||.||_F of "the i-th parameter": a scalar's absolute value, or a tensor's norm."""
    return x.abs() if case.granularity == "element" else x.double().norm().float().reshape(1)


def keep_lowest(risks: dict[str, Tensor], fraction: float) -> tuple[float, dict[str, Tensor]]:
    """Eq. 3 over all eligible parameters of the model together."""
    every = torch.cat([r.flatten() for r in risks.values()])
    tau = every.kthvalue(max(1, int(fraction * every.numel() + 1e-9))).values
    return tau.item(), {name: (r <= tau).float() for name, r in risks.items()}


@cache
def reference(case: Case) -> Twin:
    """Algorithm 1 in one process, fp32."""
    model = make_model(case)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hyper = {name: HYPER[group_of(case, name)] for name in named}
    eligible = [name for name in named if "layer" in name and "weight" in name]
    m = {name: torch.zeros_like(p) for name, p in named.items()}
    v = {name: torch.zeros_like(p) for name, p in named.items()}
    steps = []
    torch.manual_seed(DROPOUT_SEED)
    for t in range(1, case.steps + 1):
        masking = case.strategy != "none" and t > case.mask_warmup_steps
        first, second = (masking and case.strategy in (order, "ensemble") for order in ("first", "second"))
        g = {name: torch.zeros_like(p) for name, p in named.items()}
        g_kl = {name: torch.zeros_like(named[name]) for name in eligible}
        losses, divergences = [], []
        for micro in range(case.accumulation):
            ids, labels = micro_batch(case, t, micro)
            with rows(len(ids), slice(0, len(ids))):
                logits = model(ids)
                if first:
                    kl = kl_both_ways(logits, model(ids))
                    grads = torch.autograd.grad(kl, [named[n] for n in eligible], retain_graph=True)
                    for name, grad in zip(eligible, grads, strict=True):
                        g_kl[name] += grad / case.accumulation
                    divergences.append(kl.item())
                loss = F.cross_entropy(logits, labels)
                for name, grad in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
                    g[name] += grad / case.accumulation
                losses.append(loss.item())
        norm = torch.stack([x.norm() for x in g.values()]).norm().item()
        if case.clip:
            g = {name: x * min(1.0, case.clip / (norm + 1e-6)) for name, x in g.items()}
        seen = TwinStep(sum(losses) / len(losses), norm, sum(divergences) / len(divergences) if first else None)

        mask_f: dict[str, Tensor] = {}
        mask_s: dict[str, Tensor] = {}
        if first:  # Eq. 2
            risks = {name: magnitude(case, g_kl[name]) for name in eligible}
            seen.risks["first"] = risks
            seen.tau["first"], mask_f = keep_lowest(risks, case.keep_first)
        if second:  # Eq. 4
            risks = {}
            for name in eligible:
                alpha = 1 - hyper[name].betas[0]
                ratio = alpha * magnitude(case, g[name]) / magnitude(case, m[name])
                history = magnitude(case, m[name]) != 0
                risks[name] = torch.where(history, (ratio - 1).abs(), torch.zeros_like(ratio))
            seen.risks["second"] = risks
            seen.tau["second"], mask_s = keep_lowest(risks, case.keep_second)
        for order, masks in (("first", mask_f), ("second", mask_s)):
            if masks:
                seen.kept[order] = int(sum(mask.sum().item() for mask in masks.values()))

        with torch.no_grad():
            for name, p in named.items():
                h = hyper[name]
                beta1, beta2 = h.betas
                M = torch.ones_like(p)
                if name in mask_f and name in mask_s:  # Eq. 5
                    M = case.gamma * mask_f[name] + (1 - case.gamma) * mask_s[name]
                elif name in mask_f or name in mask_s:
                    M = mask_f[name] if first else mask_s[name]
                used = M * g[name] + (1 - M) * m[name]  # line 8
                m[name] = beta1 * m[name] + (1 - beta1) * used  # line 9
                v[name] = beta2 * v[name] + (1 - beta2) * used**2  # line 10
                m_hat, v_hat = m[name] / (1 - beta1**t), v[name] / (1 - beta2**t)  # line 11
                p -= h.lr * (m_hat / (v_hat.sqrt() + h.eps) + h.weight_decay * p) * M  # lines 12 and 13
        steps.append(seen)
    stream = torch.rand(4)
    return Twin({name: p.detach().clone() for name, p in model.named_parameters()}, steps, stream)


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
    for t in range(first_step, first_step + case.steps):
        for micro in range(case.accumulation):
            ids, labels = micro_batch(case, t, micro)
            share = len(ids) // world
            mine = slice(rank * share, (rank + 1) * share)
            if reseed:
                torch.manual_seed(DROPOUT_SEED + 10 * t + micro)
            with rows(len(ids), mine):
                values = stepper.backward(
                    lambda ids=ids, mine=mine: model(ids[mine]),
                    lambda logits, labels=labels, mine=mine: F.cross_entropy(logits.float(), labels[mine]),
                )
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


def near_tau(twin: Twin, rtol: float = 2e-5) -> tuple[int, int]:
    """How many risks lie within ``rtol`` of tau but are not tau, and how many there are. A risk of Eq. 4 is the
    difference of two numbers near 1, so its rounding error is that of 1, not its own."""
    near = ranked = 0
    for step in twin.steps:
        for order, risks in step.risks.items():
            every = torch.cat([r.flatten() for r in risks.values()])
            gap = (every - step.tau[order]).abs()
            scale = step.tau[order] if order == "first" else max(step.tau[order], 1.0)
            near += int(((gap > 0) & (gap <= rtol * scale)).sum())
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
    """Invariant 1: below ``tolerance``, unless risks within rounding of tau changed sides; then few elements moved."""
    found = compare(parameters, twin)
    assert found.near_tau <= 0.002 * found.ranked + 1, f"too many near ties to compare anything: {found}"
    if found.error >= tolerance:
        assert found.near_tau > 0, f"no risk was near tau, so nothing explains it: {found}"
        assert found.error < 1e-3 and found.differing < 0.01 * sum(p.numel() for p in parameters.values()), str(found)
    return found
