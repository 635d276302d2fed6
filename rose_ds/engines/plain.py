"""A model that lies whole on this process: the reference every other engine must equal."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rose_ds.core.threshold import Exchange, local_only
from rose_ds.engines.base import (
    Divergence,
    Engine,
    Forward,
    Loss,
    Losses,
    Outcome,
    Planner,
    RefusedConfiguration,
    two_passes,
)
from rose_ds.optimizer import RoseAdamW, Slice, local


class PlainEngine(Engine):
    """Single process, no wrapper. Also the base of engines whose parameters are whole on every rank."""

    name = "plain"

    def __init__(
        self, module: nn.Module, optimizer: RoseAdamW, accumulation_steps: int, max_grad_norm: float | None
    ) -> None:
        super().__init__(module, optimizer, accumulation_steps)
        low = [n for n, p in self.named_parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
        if low:
            raise RefusedConfiguration(
                f"{low[0]!r} is kept in low precision, in which most small updates round to nothing: load the model in "
                "fp32 (from_pretrained(..., dtype=torch.float32)), and for bf16 use torch.autocast, FSDP's mixed "
                "precision or DeepSpeed, which keep fp32 weights"
            )
        self.max_grad_norm = max_grad_norm
        self._micro_batches = 0
        self._locate()

    def _find_slices(self, index: dict[str, int]) -> tuple[list[Slice], list[Exchange], list[Exchange]]:
        parts = [name for name, p in self.named_parameters() if local(p) is not p]
        if parts:
            raise RefusedConfiguration(
                f"{parts[0]!r} is a DTensor, but the model is not sharded by fully_shard: tensor parallelism alone, or "
                "under DistributedDataParallel, is not supported; call fully_shard(model, mesh=...) too"
            )
        held = {p for group in self.optimizer.param_groups for p in group["params"]}
        slices = [
            Slice(name, index[name], p, 0, p.numel())
            for name, p in self.named_parameters()
            if name in index and p in held
        ]
        return slices, [local_only] * len(slices), [local_only]

    def backward(self, forward: Forward, loss: Loss, divergence: Divergence | None) -> Losses:
        kl = None
        if divergence is None:
            logits = forward()
        else:
            logits, kl = two_passes(forward, divergence)
            params = [s.param for s in self.slices]
            grads = torch.autograd.grad(
                kl / self.accumulation_steps, params, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            self.add_kl_grads([g.reshape(-1) for g in grads])
        value = loss(logits)
        (value / self.accumulation_steps).backward()
        return Losses(value.detach(), None if kl is None else kl.detach())

    def step(self, plan: Planner) -> Outcome | None:
        self._micro_batches += 1
        if self._micro_batches < self.accumulation_steps:
            return None
        self._micro_batches = 0
        norm = self._clip([p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None])
        plan(self.slice_grads(), norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(norm, skipped=self.optimizer.skips)

    def _clip(self, params: list[Tensor]) -> float:
        """Clip these parameters' gradients; their global L2 norm before."""
        norm = get_total_norm([p.grad for p in params if p.grad is not None])
        if self.max_grad_norm:
            clip_grads_with_norm_(params, self.max_grad_norm, norm)
        return norm.item()

    def gather_parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().float().clone() for name, p in self.named_parameters()}
