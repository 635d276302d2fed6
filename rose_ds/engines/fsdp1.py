"""FSDP1 (``FullyShardedDataParallel``): parameters are flattened, and each rank holds a piece of the flat one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from rose_ds.engines.base import (
    Divergence,
    Forward,
    Loss,
    Losses,
    RefusedConfiguration,
    same_pass_again,
    two_passes,
    unwrapped_name,
)
from rose_ds.engines.rng import RngState
from rose_ds.engines.sharded import Piece, ShardedEngine


class Fsdp1Engine(ShardedEngine):
    """One graph allows one backward pass, so the first pass runs again for the task gradient."""

    name = "fsdp1"

    def _two_gradients(self, forward: Forward, loss: Loss, divergence: Divergence) -> Losses:
        start = RngState.now()
        first, kl = two_passes(forward, divergence)
        (kl / self.accumulation_steps).backward()
        self._take_kl_gradient()
        again = same_pass_again(forward, start, first)
        return Losses(self._task_gradient(again, loss).loss, kl.detach())

    def backward(self, forward: Forward, loss: Loss, divergence: Divergence | None) -> Losses:
        losses = super().backward(forward, loss, divergence)
        # FSDP gives no gradient to a parameter of which nothing lies here. Without one it would have no state either,
        # and a rank without any state would not know how many steps were taken.
        for param in self._params:
            if param.grad is None and param.numel() == 0:
                param.grad = torch.zeros_like(param)
        return losses

    def gather_parameters(self) -> dict[str, Tensor]:
        with FullyShardedDataParallel.summon_full_params(self.module, writeback=False):
            return {unwrapped_name(n): p.detach().float().clone() for n, p in self.module.named_parameters()}

    def _find_pieces(self, module: nn.Module) -> list[Piece]:
        found: dict[tuple[nn.Module, str], tuple[Any, ...]] = {}
        for handle in _handles(module):
            if handle._offload_params:
                raise RefusedConfiguration(
                    "FSDP1's CPUOffload(offload_params=True) keeps one gradient buffer for both backward passes: use "
                    "fully_shard with CPUOffloadPolicy, or DeepSpeed with offload_optimizer"
                )
            flat = handle.flat_param
            groups = (handle.process_group,) if handle.uses_sharded_strategy else ()
            for i, (name, owner, _) in enumerate(flat._param_infos):
                shard = flat._shard_param_infos[i]  # padding, between parameters and at the end, is in none
                param = flat if flat._params is None else flat._params[i]
                offset = shard.offset_in_shard if flat._params is None and shard.in_shard else 0
                numel = shard.numel_in_shard if shard.in_shard else 0
                whole = torch.empty(flat._shapes[i], device="meta")
                found[owner, name] = (nn.Parameter(whole, param.requires_grad), param, offset, numel, groups)
        names: dict[nn.Module, list[str]] = {}
        for owner, name in found:
            names.setdefault(owner, []).append(name)
        return [
            Piece(unwrapped_name(f"{prefix}.{name}" if prefix else name), *found[owner, name])
            for prefix, owner in module.named_modules()
            for name in names.get(owner, [])
        ]

    def _check_sync(self) -> None:
        if not all(part._sync_gradients for part in FullyShardedDataParallel.fsdp_modules(self.module)):
            raise RefusedConfiguration(
                "FSDP's no_sync() would mix the KL gradient into the task gradient: leave it out (accelerate: "
                'gradient_accumulation_kwargs={"sync_each_batch": True}; accumulation stays exact)'
            )


def _handles(module: nn.Module) -> Iterator[Any]:
    for part in FullyShardedDataParallel.fsdp_modules(module):
        if part._handle is not None:
            yield part._handle
