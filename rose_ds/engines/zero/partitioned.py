"""Stages 1 and 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rose_ds.engines.zero.adapter import ScaledAdapter, clear_grads, stash_grads
from rose_ds.engines.zero.flat import FlatAdapter
from rose_ds.optimizer import RoseAdamW


class PartitionedAdapter(FlatAdapter, ScaledAdapter):
    """DeepSpeedZeroOptimizer, with and without CPU offload."""

    def __init__(self, ds: Any, rose_optimizer: RoseAdamW) -> None:
        super().__init__(ds, rose_optimizer, ds.optimizer.single_partition_of_fp32_groups)
        self.reduces_each_micro_batch = bool(ds.optimizer.partition_gradients)
        groups = ds.optimizer.params_in_partition
        self._place_of = {param: place for group in groups for place, param in enumerate(group)}
        self._norm: Any = None
        self._global_norm = self.ds_optimizer.scaled_global_norm
        self.ds_optimizer.scaled_global_norm = self._remember_norm

    def _remember_norm(self, *args: Any, **kwargs: Any) -> Any:
        self._norm = self._global_norm(*args, **kwargs)
        return self._norm

    def backward_apart(self, run: Callable[[], None], sums: list[Tensor]) -> None:
        z = self.ds_optimizer
        restore = stash_grads(p for group in z.bit16_groups for p in group)
        averaged, accumulating = dict(z.averaged_gradients), dict(z.all_grad_tensors)
        micro_step_id, epilogue_ran = z.micro_step_id, z._epilogue_ran_this_backward
        offloaded = (set(z._offload_accumulated_param_ids), z.local_overflow) if z.cpu_offload else None
        # None in place: parameters are linked to these dicts
        for grads in (z.averaged_gradients, z.all_grad_tensors):
            grads.update(dict.fromkeys(grads))
        z.micro_step_id = -1
        try:
            run()
            z._wait_for_offload_copies()  # from a GPU they are asynchronous
            for i, total in enumerate(sums):
                total.add_(self._waiting(i))
        finally:
            restore()
            for grads, saved in ((z.averaged_gradients, averaged), (z.all_grad_tensors, accumulating)):
                grads.update({i: saved.get(i) for i in grads})
            # Stage 1 sets its buckets up only once a step; a restored id would make the next one accumulate stale
            # offloaded gradients.
            z.micro_step_id = micro_step_id if z.partition_gradients else -1
            z._epilogue_ran_this_backward = epilogue_ran
            if offloaded is not None:
                z.reset_cpu_buffers()
                z._offload_accumulated_param_ids, z.local_overflow = offloaded
                clear_grads(z.single_partition_of_fp32_groups)

    def after_step(self) -> None:
        # a parameter that the next step does not reach would find this one's gradient
        if self.ds_optimizer.cpu_offload:
            clear_grads(self.ds_optimizer.single_partition_of_fp32_groups)

    def so_far(self, i: int) -> Tensor:
        z, piece, param = self.ds_optimizer, self.slices[i], self.params[i]
        mapping: Any = param._hp_mapping  # type: ignore[attr-defined]
        group, start = mapping.param_group_index, mapping.lp_fragment_address.start
        if z._use_compact_grad_partition_buffer(group):  # 16 bits, added up in fp32
            found, start = getattr(z.averaged_gradients.get(group), "flat_partition", None), piece.offset
        # else as long as the whole parameter, and reduced where this rank's part of it is
        elif z.cpu_offload:
            z._wait_for_offload_copies()
            number = z.get_param_id(param)
            found = z.accumulated_grads_in_cpu.get(number) if number in z._offload_accumulated_param_ids else None
        else:
            found = z.all_grad_tensors[group][self._place_of[param]]
        if found is None:  # no micro-batch has used the parameter
            return torch.zeros(piece.numel, device=piece.param.device)
        part: Tensor = found.detach().view(-1).narrow(0, start, piece.numel)
        return part

    def _waiting(self, i: int) -> Tensor:
        if self.ds_optimizer.cpu_offload:
            return self.slices[i].grad()
        param: Any = self.params[i]
        fragment: Tensor = param._hp_mapping.get_lp_grad_fragment(param._index_in_param_group)
        return fragment.detach().reshape(-1)

    def _scaled_norm(self) -> Any:
        return self._norm if self.ds_optimizer.compute_grad_norm else None
