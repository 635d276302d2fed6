"""FSDP2 (``fully_shard``): every parameter is a DTensor, split over the mesh dimensions that shard it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from rose_ds.engines.base import Divergence, Forward, Loss, Losses, RefusedConfiguration, two_passes, unwrapped_name
from rose_ds.engines.sharded import Groups, Piece, ShardedEngine
from rose_ds.optimizer import local


class Fsdp2Engine(ShardedEngine):
    """Both backward passes share the first pass's graph; each reduces into the sharded parameters' ``grad``."""

    name = "fsdp2"

    def _two_gradients(self, forward: Forward, loss: Loss, divergence: Divergence) -> Losses:
        first, kl = two_passes(forward, divergence)
        (kl / self.accumulation_steps).backward(retain_graph=True)
        self._take_kl_gradient()
        return Losses(self._task_gradient(first, loss).loss, kl.detach())

    def gather_parameters(self) -> dict[str, Tensor]:
        return {piece.name: _whole(piece.param).float().clone() for piece in self.pieces}

    def _find_pieces(self, module: nn.Module) -> list[Piece]:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # after an evaluation, parameters may be registered unsharded
        managed = {p.sharded_param for group in _param_groups(module) for p in group.fsdp_params}
        return [
            Piece(unwrapped_name(name), param, param, 0, local(param).numel(), _groups(name, param))
            for name, param in module.named_parameters()
            if param in managed
        ]

    def _check_sync(self) -> None:
        if not all(state._state_ctx.is_last_backward for state in _states(self.module)):
            raise RefusedConfiguration(
                "set_is_last_backward(False) ends a backward pass before its gradients are reduced: leave it at True"
            )
        for group in _param_groups(self.module):
            if not (group.reduce_grads and group.all_reduce_grads):
                raise RefusedConfiguration(
                    "set_requires_gradient_sync(False) or set_requires_all_reduce(False) would mix the KL gradient "
                    "into the task gradient: leave both on for every micro-batch (accelerate: "
                    'gradient_accumulation_kwargs={"sync_each_batch": True}; accumulation stays exact)'
                )
            if not group.reshard_after_backward:
                raise RefusedConfiguration(
                    "set_reshard_after_backward(False) keeps parameters of the first backward pass for the second, "
                    "which is not known to be exact: leave it at True"
                )


def _groups(name: str, param: Tensor) -> Groups:
    """The groups that split ``param``; a mesh dimension that replicates it must not count it twice."""
    assert isinstance(param, DTensor)
    groups: list[dist.ProcessGroup] = []
    for dim, placement in enumerate(param.placements):
        if isinstance(placement, (Shard, _StridedShard)):
            groups.append(param.device_mesh.get_group(dim))
        elif not isinstance(placement, Replicate):
            raise RefusedConfiguration(f"{name!r} has the placement {placement}: only Shard and Replicate are known")
    return tuple(groups)


def _whole(param: Tensor) -> Tensor:
    assert isinstance(param, DTensor)
    # offloaded shards go back to where their mesh communicates
    shards: Any = param.detach().to(param.device_mesh.device_type)
    whole: Tensor = shards.full_tensor()
    return whole


def _states(module: nn.Module) -> Iterator[Any]:
    for part in module.modules():
        if isinstance(part, FSDPModule):
            yield part._get_fsdp_state()


def _param_groups(module: nn.Module) -> Iterator[Any]:
    for state in _states(module):
        groups = getattr(state, "_fsdp_param_groups", None)  # torch < 2.13 has one at most
        yield from [state._fsdp_param_group] if groups is None and state._fsdp_param_group else groups or []
