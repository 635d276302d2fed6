"""A model that lies whole on this process: the reference every other engine must equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rose_ds.core.layout import Block
from rose_ds.core.threshold import Exchange, local_only
from rose_ds.engines.base import Decision, Engine, Outcome
from rose_ds.engines.passes import Pull
from rose_ds.errors import RefusedConfiguration
from rose_ds.optimizer import RoseAdamW, Slice, local

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


class TorchEngine(Engine):
    """Base of the engines whose backward passes fill in ``grad`` of what the optimizer holds."""

    gradients_may_be_dropped = True

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
        self._refuse_fp16()
        self.max_grad_norm = max_grad_norm
        self._micro_batches = 0
        self._locate()
        if dist.is_initialized() and self.ranks() != dist.get_world_size():
            raise RefusedConfiguration(
                f"the model is trained by {self.ranks()} of the job's {dist.get_world_size()} ranks (a process_group, "
                "or a mesh over some of them), and rose_ds agrees on what it does over all: train it on every rank, or "
                "start a job of its own for it"
            )

    def ranks(self) -> int:
        """How many train this model."""
        return 1

    def begin_step(self) -> None:
        self._micro_batches = 0

    def pull(self, pulls: Sequence[Pull], *, more: bool) -> None:
        roots, cotangents = roots_of(pulls)
        torch.autograd.backward(roots, cotangents)

    def count(self, *, last: bool) -> None:
        self._micro_batches = 0 if last else self._micro_batches + 1

    def step(self, decide: Decision) -> Outcome | None:
        self._micro_batches += 1
        if self._micro_batches < self.accumulation_steps:
            return None
        self._micro_batches = 0
        norm = self._clip([p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None])
        decide(self.slice_grads(), norm, clip=clip_factor(norm, self.max_grad_norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(norm, skipped=self.optimizer.skips)

    def abandon(self, error: BaseException) -> None:
        super().abandon(error)
        self._micro_batches = 0
        if self.recovers:
            self.optimizer.zero_grad(set_to_none=True)

    def _refuse_fp16(self) -> None:
        """Hooks, because autocast may be entered anywhere round the model, or inside it; on all such layers, because
        the first ones may be frozen, or be run by another module without being called."""
        for layer in self._layers():
            if _no_fp16 not in layer._forward_hooks.values():
                layer.register_forward_hook(_no_fp16)
        self._watches_fp16 = True

    def first_passes_made(self) -> None:
        if self._watches_fp16 and not self.compiled:  # or it would be compiled once more
            for layer in self._layers():
                for key in [key for key, hook in layer._forward_hooks.items() if hook is _no_fp16]:
                    del layer._forward_hooks[key]
            self._watches_fp16 = False

    def _layers(self) -> Iterator[nn.Module]:
        return (m for m in self.module.modules() if isinstance(m, _LAYERS) or type(m).__name__ == "Conv1D")

    def _clip(self, params: list[Tensor]) -> float:
        """Clip these parameters' gradients; their global L2 norm before."""
        norm = get_total_norm([p.grad for p in params if p.grad is not None])
        if self.max_grad_norm:
            clip_grads_with_norm_(params, self.max_grad_norm, norm)
        return norm.item()


def _no_fp16(module: nn.Module, args: object, out: object) -> None:
    """A forward hook; the module's own name, so that a prepared model can be pickled as before."""
    if module.training and isinstance(out, Tensor) and out.dtype == torch.float16 and out.requires_grad:
        raise RefusedConfiguration(
            "the model runs in fp16 (autocast, or FSDP's mixed precision) without a scaled loss, so small "
            "gradients become zero: use bf16, or fp16 through DeepSpeed, which scales the loss"
        )


class PlainEngine(TorchEngine):
    """Single process, no wrapper. Also the base of DDP's engine, whose parameters are whole on every rank too."""

    name = "plain"
    recovers = True
    replicated = True

    def find_slices(self, names: Sequence[str]) -> tuple[list[Slice], list[Exchange], list[Exchange]]:
        parts = [name for name, p in self.named_parameters() if local(p) is not p]
        if parts:
            raise RefusedConfiguration(
                f"{parts[0]!r} is a DTensor, but the model is not sharded by fully_shard: tensor parallelism alone, or "
                "under DistributedDataParallel, is not supported; call fully_shard(model, mesh=...) too"
            )
        held = {p for group in self.optimizer.param_groups for p in group["params"]}
        index = {name: i for i, name in enumerate(names)}
        slices = [
            Slice(name, index[name], p, 0, p.numel(), Block.flat(p.numel(), 0, p.numel()))
            for name, p in self.named_parameters()
            if name in index and p in held
        ]
        return slices, [local_only] * len(slices), [local_only]

    def pull_apart(self, pulls: Sequence[Pull]) -> None:
        roots, cotangents = roots_of(pulls)
        params = [s.param for s in self.slices]
        grads = torch.autograd.grad(
            roots, params, cotangents, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        self.add_risk_grads(g.reshape(-1) for g in grads)

    def gather_parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().float().clone() for name, p in self.named_parameters()}


def roots_of(pulls: Sequence[Pull]) -> tuple[list[Tensor], list[Tensor]]:
    """All passes' outputs and cotangents together."""
    parts = [pull.roots() for pull in pulls]
    return [out for outs, _ in parts for out in outs], [c for _, cotangents in parts for c in cotangents]


def clip_factor(norm: float | None, max_norm: float | None) -> float:
    """What torch's clipping multiplies gradients of this norm with."""
    return 1.0 if norm is None or not max_norm else min(1.0, max_norm / (norm + 1e-6))
