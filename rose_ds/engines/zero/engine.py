"""A DeepSpeedEngine, behind the stepper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from rose_ds.core.threshold import Exchange, local_only
from rose_ds.engines.base import (
    Divergence,
    Engine,
    Forward,
    Loss,
    Losses,
    Outcome,
    Planner,
    same_pass_again,
    two_passes,
)
from rose_ds.engines.rng import RngState
from rose_ds.engines.zero.adapter import Adapter
from rose_ds.engines.zero.bf16 import Bf16Adapter
from rose_ds.engines.zero.checkpoint import Checkpoints
from rose_ds.engines.zero.partitioned import PartitionedAdapter
from rose_ds.engines.zero.refuse import base_optimizer, check_engine
from rose_ds.engines.zero.replicated import Fp32Adapter, ReplicatedAdapter, UnfusedAdapter
from rose_ds.engines.zero.stage3 import Stage3Adapter
from rose_ds.exchange import group_exchange
from rose_ds.optimizer import RoseAdamW, Slice


class ZeroEngine(Engine):
    """ZeRO 0 to 3. Optimizer, accumulation and clipping are the DeepSpeed config's."""

    def __init__(self, engine: Any) -> None:
        base = base_optimizer(engine)
        check_engine(engine)
        self.engine = engine
        self.name = f"zero{int(engine.zero_optimization_stage())}"
        super().__init__(engine.module, base, int(engine.gradient_accumulation_steps()))
        self.adapter = _adapter_class(engine)(engine, base)
        self._locate()
        self.accumulating = False
        """Whether there are gradients of micro-batches that no optimizer step has used yet."""
        Checkpoints(self)

    def _find_slices(self, index: dict[str, int]) -> tuple[list[Slice], list[Exchange], list[Exchange]]:
        slices = self.adapter.find_slices(index)
        replicated = isinstance(self.adapter, ReplicatedAdapter)
        exchange = local_only if replicated else group_exchange(self.adapter.group())
        return slices, [exchange] * len(slices), [exchange]

    def numel(self, param: nn.Parameter) -> int:
        return int(getattr(param, "ds_numel", param.numel()))

    def beta1_of(self) -> dict[Tensor, float]:
        # DeepSpeed takes the groups apart while it steps them: what they were before
        return self._beta1_of

    def backward(self, forward: Forward, loss: Loss, divergence: Divergence | None) -> Losses:
        self.accumulating = True
        kl = None
        if divergence is None:
            logits = forward()
        else:
            start = RngState.now()
            first, kl = self._kl_gradients(forward, divergence)
            logits = first if self.adapter.shares_graph else same_pass_again(forward, start, first)
        value = loss(logits)
        self.engine.backward(self.adapter.to_backward(value / self.accumulation_steps), scale_wrt_gas=False)
        return Losses(value.detach(), None if kl is None else kl.detach())

    def _kl_gradients(self, forward: Forward, divergence: Divergence) -> tuple[Tensor, Tensor]:
        """Add both passes' part of the KL gradient to its sums; the first pass's logits and the divergence."""
        if self.adapter.shares_graph:
            first, kl = two_passes(forward, divergence)
            self._kl_backward(kl / self.accumulation_steps, retain_graph=True)
            return first, kl
        # Through both passes at once, every parameter's gradient of the one would wait, whole, for that of the other.
        # Cut at the logits, each pass has a backward pass of its own, and a gradient is gone once it is reduced.
        passes: list[tuple[Tensor, Tensor]] = []

        def between_leaves(*logits: Tensor) -> Tensor:
            passes.extend((x, x.detach().float().requires_grad_()) for x in logits)
            return divergence(*(leaf for _, leaf in passes))

        first, kl = two_passes(forward, between_leaves)
        grads = torch.autograd.grad(kl / self.accumulation_steps, [leaf for _, leaf in passes])
        rearm = self.adapter.rearmed()
        while passes:
            rearm()
            logits, grad = passes.pop()[0], grads[len(passes)]
            self._kl_backward((logits.float() * grad).sum(), retain_graph=False)
        return first, kl

    def _kl_backward(self, kl: Tensor, retain_graph: bool) -> None:
        if self._kl_grads is None:
            self._kl_grads, self._kl_scale = self.adapter.kl_sums(), self.adapter.loss_scale
        boundary = self.engine._is_gradient_accumulation_boundary
        scaled = self.adapter.to_backward(kl)
        # every micro-batch's KL gradient is reduced at once, so that only this rank's slice of the sum is kept
        self.engine.set_gradient_accumulation_boundary(True)
        try:
            self.adapter.kl_backward(
                lambda: self.engine.backward(scaled, retain_graph=retain_graph, scale_wrt_gas=False),
                self._kl_grads,
            )
        finally:
            self.engine._is_gradient_accumulation_boundary = boundary
            if hasattr(self.engine.optimizer, "set_gradient_accumulation_boundary"):
                self.engine.optimizer.set_gradient_accumulation_boundary(
                    self.engine.is_gradient_accumulation_boundary()
                )

    def take_kl_grads(self) -> list[Tensor] | None:
        grads = super().take_kl_grads()
        if grads and self._kl_scale != 1.0:
            torch._foreach_mul_(grads, 1.0 / self._kl_scale)
        return grads

    def step(self, plan: Planner) -> Outcome | None:
        boundary = self.engine.is_gradient_accumulation_boundary()
        norm: float | None = None
        planned = False

        def on_plan(grads: Sequence[Tensor], grad_norm: float | None, scale: Tensor | float = 1.0) -> None:
            nonlocal norm, planned
            norm, planned = grad_norm, True
            plan(grads, grad_norm, scale)

        if boundary:
            self._beta1_of = self.adapter.beta1_of()
            self.adapter.on_plan = on_plan
            if isinstance(self.adapter, Fp32Adapter):
                self.adapter.measure_norm()
        try:
            self.engine.step()
        finally:
            self.adapter.on_plan = None
        if not boundary:
            return None
        self.accumulating = False
        # DeepSpeed returns before the plan when the task gradient is not finite
        return Outcome(norm, skipped=not planned or self.optimizer.skips)

    def gather_parameters(self) -> dict[str, Tensor]:
        return {name: self.adapter.full_parameter(p) for name, p in self.named_parameters()}


def _adapter_class(engine: Any) -> type[Adapter]:
    stage = int(engine.zero_optimization_stage())
    if isinstance(engine.optimizer, BF16_Optimizer):
        return Bf16Adapter
    if isinstance(engine.optimizer, RoseAdamW):
        return Fp32Adapter
    return (UnfusedAdapter, PartitionedAdapter, PartitionedAdapter, Stage3Adapter)[stage]
