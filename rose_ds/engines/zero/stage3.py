"""Stage 3: parameters, gradients and states are all partitioned, each parameter over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from rose_ds.core.layout import Block
from rose_ds.engines.zero.adapter import ScaledAdapter, clear_grads
from rose_ds.engines.zero.trace import LongestTrace
from rose_ds.optimizer import RoseAdamW, Slice

_BUFFERS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"


class Stage3Adapter(ScaledAdapter):
    """DeepSpeedZeroOptimizer_Stage3, with and without CPU offload."""

    reduces_each_micro_batch = True
    reduces_at_boundary = False  # where DeepSpeed would also copy it to the offloaded optimizer
    shares_graph = False  # a backward pass releases the gathered parameters that other graphs still refer to

    def __init__(self, ds: Any, rose_optimizer: RoseAdamW) -> None:
        super().__init__(ds, rose_optimizer)
        self._norm_groups: list[Any] = []
        self._get_norm_groups = self.ds_optimizer._get_norm_groups
        self.ds_optimizer._get_norm_groups = self._remember_norm_groups
        for flat in self.ds_optimizer.fp32_partitioned_groups_flat:
            rose_optimizer.init_state(flat)
        self._trace = LongestTrace(ds.module, self.ds_optimizer.parameter_offload.get_param_coordinator())

    def micro_batch(self) -> AbstractContextManager[object]:
        return self._trace.micro_batch()

    def _remember_norm_groups(self) -> list[Any]:
        self._norm_groups = self._get_norm_groups()
        return self._norm_groups

    def _slice_of(self, name: str, tensor_index: int, param: nn.Parameter) -> Slice | None:
        z = self.ds_optimizer
        position = z.grad_position.get(z.get_param_id(param))
        if position is None:  # the optimizer has not got it
            return None
        sub_group, offset, numel = position
        # every rank's partition has the same size; the last ones may be padding in part or whole
        whole, start = int(param.ds_numel), z._get_param_partition_rank(param) * numel  # type: ignore[attr-defined]
        real = min(numel, max(0, whole - start))
        if real == 0:
            return None
        block = Block.flat(whole, start, real)
        return Slice(name, tensor_index, z.fp32_partitioned_groups_flat[sub_group], offset, real, block)

    def beta1_of(self) -> dict[Tensor, float]:
        # between steps stage 3 keeps its partitions out of the groups
        z = self.ds_optimizer
        return {
            flat: self.rose_optimizer.param_groups[z.sub_group_to_group_id[i]]["betas"][0]
            for i, flat in enumerate(z.fp32_partitioned_groups_flat)
        }

    def risk_sums(self) -> list[Tensor]:
        # As long as DeepSpeed's buffers, padding included: the backward pass adds to these themselves. Pinned if those
        # are, or it would wait for every gradient's copy; torch keeps freed pinned memory for the next step.
        buffers = [self._buffers[p.ds_id] for p in self.params]  # type: ignore[attr-defined]
        pinned = bool(buffers) and buffers[0].is_pinned()  # all are parts of one
        return [
            torch.zeros(buffer.shape, dtype=torch.float32, device=buffer.device, pin_memory=pinned).narrow(
                0, 0, piece.numel
            )
            for piece, buffer in zip(self.slices, buffers, strict=True)
        ]

    def backward_apart(self, run: Callable[[], None], sums: list[Tensor]) -> None:
        z, buffers = self.ds_optimizer, self._buffers
        saved, averaged = dict(buffers), dict(z.averaged_gradients)
        micro_step_id, epilogue_ran = z.micro_step_id, z._epilogue_ran_this_backward
        # Lend the backward pass the sums in place of the task gradient's buffers: neither is copied. Gradients of the
        # parameters that are never masked have to go somewhere too: all to one place.
        lent = {p.ds_id: total._base for p, total in zip(self.params, sums, strict=True)}  # type: ignore[attr-defined]
        others = [buffer for i, buffer in saved.items() if i not in lent]
        largest = max(others, key=Tensor.numel) if others else None
        # pinned where those are: or each copy into it would be waited for
        scratch = None if largest is None else torch.empty_like(largest, pin_memory=largest.is_pinned())
        for i, buffer in saved.items():
            into = lent.get(i)
            buffers[i] = scratch.narrow(0, 0, buffer.numel()) if into is None else into  # type: ignore[union-attr]
        z.micro_step_id, z._epilogue_ran_this_backward = 1, False  # 1: add to what is there
        try:
            run()
        finally:
            buffers.update(saved)
            z.averaged_gradients.clear()
            z.averaged_gradients.update(averaged)
            z.micro_step_id, z._epilogue_ran_this_backward = micro_step_id, epilogue_ran
            if z.offload_optimizer:
                z.reset_cpu_buffers()
                clear_grads(z.fp32_partitioned_groups_flat)

    def after_step(self) -> None:
        # DeepSpeed copies a step's first gradients into its buffer and adds the others. A parameter without a part in
        # the first, or in the whole step, would go on with what the last step has left there.
        z = self.ds_optimizer
        if z.grad_partitions_flat_buffer is not None:
            z.grad_partitions_flat_buffer.zero_()
        if z.offload_optimizer:
            clear_grads(z.fp32_partitioned_groups_flat)

    def rearmed(self) -> Callable[[], None]:
        # A module's gathered parameters go when its backward pass has counted this down to 0; a forward pass sets it,
        # and does not add to what an earlier one set.
        modules = [m for m in self.ds.module.modules() if "ds_grads_remaining" in vars(m)]
        counts = [m.ds_grads_remaining for m in modules]

        def rearm() -> None:
            for module, count in zip(modules, counts, strict=True):
                module.ds_grads_remaining = count  # type: ignore[assignment]

        return rearm

    def publish(self) -> None:
        z = self.ds_optimizer
        z.empty_partition_cache()
        for i in range(len(z.fp32_partitioned_groups_flat)):
            z._reassign_or_swap_out_partitioned_parameters(i)
        if z.persistent_parameters:  # kept whole on every rank, outside the partitions
            z.persistent_parameters[0].all_gather(z.persistent_parameters)

    @property
    def _buffers(self) -> dict[int, Tensor]:
        """Where DeepSpeed keeps this rank's part of each reduced gradient, by the parameter's number."""
        buffers: dict[int, Tensor] = getattr(self.ds_optimizer, _BUFFERS)
        return buffers

    def so_far(self, i: int) -> Tensor:
        return self._buffers[self.params[i].ds_id].narrow(0, 0, self.slices[i].numel)  # type: ignore[attr-defined]

    def _waiting(self, i: int) -> Tensor:
        return self.slices[i].grad() if self.ds_optimizer.offload_optimizer else self.so_far(i)

    def _scaled_norm(self) -> Any:
        return combine_grad_norm_groups(self._norm_groups)

    def full_parameter(self, param: nn.Parameter) -> Tensor:
        if param.requires_grad:
            full: Tensor = safe_get_full_fp32_param(param)
            return full.detach()
        with deepspeed.zero.GatheredParameters([param]):
            return param.detach().float().clone()
