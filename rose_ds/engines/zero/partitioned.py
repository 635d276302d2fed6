"""Stages 1 and 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from rose_ds.engines.zero.adapter import LazyGrads, finite_norm, scale_of_clipping, stash_grads
from rose_ds.engines.zero.flat import FlatAdapter
from rose_ds.optimizer import RoseAdamW


class PartitionedAdapter(FlatAdapter):
    """DeepSpeedZeroOptimizer, with and without CPU offload."""

    def __init__(self, engine: Any, base: RoseAdamW) -> None:
        super().__init__(engine, base, engine.optimizer.single_partition_of_fp32_groups)
        self._clip = self.outer.unscale_and_clip_grads
        self.outer.unscale_and_clip_grads = self._unscale_and_clip_grads

    def kl_backward(self, run: Callable[[], None]) -> list[Tensor]:
        z = self.outer
        restore = stash_grads(p for group in z.bit16_groups for p in group)
        averaged, accumulating = dict(z.averaged_gradients), dict(z.all_grad_tensors)
        micro_step_id, epilogue_ran = z.micro_step_id, z._epilogue_ran_this_backward
        active = set(z._offload_accumulated_param_ids) if z.cpu_offload else set()
        # None in place: parameters are linked to these dicts
        for grads in (z.averaged_gradients, z.all_grad_tensors):
            grads.update(dict.fromkeys(grads))
        z.micro_step_id = -1
        try:
            run()
            return [self._unscaled(self._reduced(p)) for p in self.params]
        finally:
            restore()
            for grads, saved in ((z.averaged_gradients, averaged), (z.all_grad_tensors, accumulating)):
                grads.update({i: saved.get(i) for i in grads})
            # Stage 1 sets its buckets up only once a step; a restored id would make the next one accumulate stale
            # offloaded gradients.
            z.micro_step_id = micro_step_id if z.partition_gradients else -1
            z._epilogue_ran_this_backward = epilogue_ran
            if z.cpu_offload:
                z.reset_cpu_buffers()
                z._offload_accumulated_param_ids = active
                for flat in z.single_partition_of_fp32_groups:
                    flat.grad.zero_()

    def _reduced(self, param: nn.Parameter) -> Tensor:
        """This rank's slice of the reduced gradient right after a backward pass at the boundary, 1-D."""
        mapping = param._hp_mapping  # type: ignore[attr-defined]
        if self.outer.cpu_offload:
            address = mapping.hp_fragment_address
            flat = self.outer.single_partition_of_fp32_groups[mapping.param_group_index]
            reduced: Tensor = flat.grad.narrow(0, address.start, address.numel).clone()
            return reduced
        fragment: Tensor = mapping.get_lp_grad_fragment(param._index_in_param_group)  # type: ignore[attr-defined]
        return fragment.detach().reshape(-1)

    def _unscale_and_clip_grads(self, grad_groups_flat: list[Tensor], total_norm: Any) -> None:
        """Replaces DeepSpeed's method. Its first call in a step finds overflow resolved, the global norm known and
        nothing updated; the first group's gradient is in place and the others' still wait, unscaled."""
        scale = scale_of_clipping(self.outer, total_norm)
        norm = finite_norm(None if total_norm is None else total_norm / self.outer.loss_scale)
        self._clip(grad_groups_flat, total_norm)
        if self.on_plan is None:
            return
        plan, self.on_plan = self.on_plan, None
        clipped = grad_groups_flat[0]

        def grad(i: int) -> Tensor:
            piece = self.slices[i]
            if piece.param.grad is clipped:
                return piece.view(clipped)
            if self.outer.cpu_offload:
                return piece.view(piece.param.grad).mul(scale)  # type: ignore[arg-type]
            return self._reduced(self.params[i]).to(piece.param.dtype).mul(scale)

        plan(LazyGrads(len(self.slices), grad), norm)
