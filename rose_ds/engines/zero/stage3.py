"""Stage 3: parameters, gradients and states are all partitioned, each parameter over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from rose_ds.engines.zero.adapter import Adapter, LazyGrads, finite_norm, scale_of_clipping
from rose_ds.optimizer import RoseAdamW, Slice

_BUFFERS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"


class Stage3Adapter(Adapter):
    """DeepSpeedZeroOptimizer_Stage3, with and without CPU offload."""

    shares_graph = False  # a backward pass releases the gathered parameters that the shared graph still refers to

    def __init__(self, engine: Any, base: RoseAdamW) -> None:
        super().__init__(engine, base)
        self._clip = self.outer.unscale_and_clip_grads
        self.outer.unscale_and_clip_grads = self._unscale_and_clip_grads
        for flat in self.outer.fp32_partitioned_groups_flat:
            base.init_state(flat)

    def group(self) -> dist.ProcessGroup | None:
        group: dist.ProcessGroup | None = self.outer.dp_process_group
        return group

    def _slice_of(self, name: str, tensor_index: int, param: nn.Parameter) -> Slice | None:
        z = self.outer
        sub_group, offset, numel = z.grad_position[z.get_param_id(param)]
        # every rank's partition has the same size; the last ones may be padding in part or whole
        real = min(numel, max(0, param.ds_numel - z._get_param_partition_rank(param) * numel))  # type: ignore[attr-defined]
        if real == 0:
            return None
        return Slice(name, tensor_index, z.fp32_partitioned_groups_flat[sub_group], offset, real)

    def beta1_of(self) -> dict[Tensor, float]:
        # between steps stage 3 keeps its partitions out of the groups
        z = self.outer
        return {
            flat: self.base.param_groups[z.sub_group_to_group_id[i]]["betas"][0]
            for i, flat in enumerate(z.fp32_partitioned_groups_flat)
        }

    def kl_backward(self, run: Callable[[], None]) -> list[Tensor]:
        z = self.outer
        buffers: dict[int, Tensor] = getattr(z, _BUFFERS)
        saved, averaged = dict(buffers), dict(z.averaged_gradients)
        micro_step_id, epilogue_ran = z.micro_step_id, z._epilogue_ran_this_backward
        # Lend the backward pass buffers of our own: the task gradient's are not touched, and nothing is copied.
        flat = torch.zeros_like(z.grad_partitions_flat_buffer)
        offset = 0
        for i, buffer in saved.items():
            buffers[i] = flat.narrow(0, offset, buffer.numel())
            offset += buffer.numel()
        z.micro_step_id, z._epilogue_ran_this_backward = 0, False
        try:
            run()
            return [
                self._unscaled(buffers[p.ds_id].narrow(0, 0, s.numel))  # type: ignore[attr-defined]
                for s, p in zip(self.slices, self.params, strict=True)
            ]
        finally:
            buffers.update(saved)
            z.averaged_gradients.clear()
            z.averaged_gradients.update(averaged)
            z.micro_step_id, z._epilogue_ran_this_backward = micro_step_id, epilogue_ran
            if z.offload_optimizer:
                z.reset_cpu_buffers()
                for partition in z.fp32_partitioned_groups_flat:
                    partition.grad.zero_()

    def _unscale_and_clip_grads(self, sub_group_id: int, total_norm: Any) -> None:
        """Replaces DeepSpeed's method; see PartitionedAdapter's. Called once a sub-group."""
        scale = scale_of_clipping(self.outer, total_norm)
        norm = finite_norm(total_norm / self.outer.loss_scale)
        self._clip(sub_group_id, total_norm)
        if self.on_plan is None:
            return
        plan, self.on_plan = self.on_plan, None
        clipped = self.outer.fp32_partitioned_groups_flat[sub_group_id]
        buffers: dict[int, Tensor] = getattr(self.outer, _BUFFERS)

        def grad(i: int) -> Tensor:
            piece = self.slices[i]
            if piece.param is clipped:
                return piece.view(clipped.grad)  # type: ignore[arg-type]
            if self.outer.offload_optimizer:
                return piece.view(piece.param.grad).mul(scale)  # type: ignore[arg-type]
            reduced = buffers[self.params[i].ds_id].narrow(0, 0, piece.numel)  # type: ignore[attr-defined]
            return reduced.to(piece.param.dtype).mul(scale)

        plan(LazyGrads(len(self.slices), grad), norm)

    def full_parameter(self, param: nn.Parameter) -> Tensor:
        if param.requires_grad:
            full: Tensor = safe_get_full_fp32_param(param)
            return full.detach()
        with deepspeed.zero.GatheredParameters([param]):
            return param.detach().float().clone()
