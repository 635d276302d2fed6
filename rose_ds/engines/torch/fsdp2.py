"""FSDP2 (``fully_shard``): every parameter is a DTensor, split over the mesh dimensions that shard it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from rose_ds.core.layout import Block
from rose_ds.engines.base import unwrapped_name
from rose_ds.engines.torch.sharded import Managed, ProcessGroups, ShardedEngine, refuse_fp16_reduction
from rose_ds.errors import RefusedConfiguration
from rose_ds.optimizer import local


class Fsdp2Engine(ShardedEngine):
    """Any number of passes and pulls; each pull reduces into the sharded parameters' ``grad``."""

    name = "fsdp2"
    pulls_reentrant = True

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        self._take_orders()  # of evaluations
        _reshard(self.module)
        with super().micro_batch():
            yield

    def after_forward(self) -> Callable[[], None]:
        # A backward pass gathers ahead in the order of the forward passes before it, and FSDP forgets that with the
        # first one's end.
        orders = self._take_orders()

        def rearm() -> None:
            for context, order in orders:
                context.post_forward_order[:] = order
                for group in order:
                    group._post_forward_indices.clear()
                for i, group in enumerate(order):
                    group._post_forward_indices.append(i)

        return rearm

    def _take_orders(self) -> list[tuple[Any, list[Any]]]:
        """Of each root's parameter groups, as forward passes went through them; forgotten there."""
        orders = []
        for context in dict.fromkeys(state._comm_ctx for state in _states(self.module)):
            order = list(getattr(context, "post_forward_order", ()))  # there from the first forward pass on
            if order:
                context.post_forward_order.clear()
                for group in order:
                    group._post_forward_indices.clear()
                orders.append((context, order))
        return orders

    def ranks(self) -> int:
        """Those of all parameters' meshes: tensor parallelism adds to that of the data."""
        meshes: list[Any] = [m.param.device_mesh for m in self.managed]  # type: ignore[attr-defined]
        return len({rank for mesh in dict.fromkeys(meshes) for rank in mesh.mesh.flatten().tolist()})

    def stepped(self) -> None:
        _reshard(self.module)

    def settle(self) -> None:
        _reshard(self.module)
        if torch.accelerator.is_available() and any(local(m.param).device.type == "cpu" for m in self.managed):
            torch.accelerator.synchronize()  # offloaded shards are pinned, and may still be on their way

    def gather_parameters(self) -> dict[str, Tensor]:
        return {m.name: _whole(m.param).float().clone() for m in self.managed}

    def _find_managed(self, module: nn.Module) -> list[Managed]:
        _reshard(module)  # after an evaluation, parameters may be registered unsharded
        for group in _param_groups(module):
            refuse_fp16_reduction(group.mp_policy.reduce_dtype or group.mp_policy.param_dtype)
        managed = {p.sharded_param for group in _param_groups(module) for p in group.fsdp_params}
        return [
            Managed(unwrapped_name(name), param, param, 0, _block(param), _groups(name, param))
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
                    "set_requires_gradient_sync(False) or set_requires_all_reduce(False) would mix the gradient kept "
                    "apart into the one that trains: leave both on for every micro-batch (accelerate: "
                    'gradient_accumulation_kwargs={"sync_each_batch": True}; accumulation stays exact)'
                )
            if not group.reshard_after_backward:
                raise RefusedConfiguration(
                    "set_reshard_after_backward(False) keeps parameters of the first backward pass for the second, "
                    "which is not known to be exact: leave it at True"
                )


def shard_by_layer(model: nn.Module, device: torch.device, **options: Any) -> None:
    """``fully_shard`` over all ranks, in place: transformers' layers each, then the rest. ``options`` go to it."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers = set(getattr(model, "_no_split_modules", None) or ())  # transformers' names of its layers' classes
    for part in [m for m in model.modules() if type(m).__name__ in layers]:
        fully_shard(part, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def _block(param: Tensor) -> Block:
    """Where this rank's shard lies in the whole parameter."""
    assert isinstance(param, DTensor)
    extent, start = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    block = Block(tuple(param.shape), tuple(start), tuple(extent))
    if block.numel != local(param).numel():  # a placement whose offsets torch does not tell
        raise RefusedConfiguration(f"a shard of placements {param.placements} has no known place in its tensor")
    return block


def _groups(name: str, param: Tensor) -> ProcessGroups:
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


def _reshard(module: nn.Module) -> None:
    """A forward pass that no backward pass followed leaves its copy of the root's weights, which the step does not
    reach, to the next one. Costs nothing where there is none."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _states(module: nn.Module) -> Iterator[Any]:
    for part in module.modules():
        if isinstance(part, FSDPModule):
            yield part._get_fsdp_state()


def _param_groups(module: nn.Module) -> Iterator[Any]:
    for state in _states(module):
        groups = getattr(state, "_fsdp_param_groups", None)  # torch < 2.13 has one at most
        yield from [state._fsdp_param_group] if groups is None and state._fsdp_param_group else groups or []
