"""Stage 1 with bf16 parameters and fp32 accumulation: DeepSpeed's BF16_Optimizer.

Every rank accumulates the whole fp32 gradient and owns a flat partition of masters and moments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from rose_ds.engines.zero.adapter import finite_norm, stash_grads
from rose_ds.engines.zero.flat import FlatAdapter
from rose_ds.optimizer import RoseAdamW


class Bf16Adapter(FlatAdapter):
    """BF16_Optimizer."""

    def __init__(self, ds: Any, rose_optimizer: RoseAdamW) -> None:
        super().__init__(ds, rose_optimizer, ds.optimizer.fp32_groups_flat_partition)
        rose_optimizer.register_step_pre_hook(self._before_step)

    def backward_apart(self, run: Callable[[], None], sums: list[Tensor]) -> None:
        z = self.ds_optimizer
        has_gradients = [list(flags) for flags in z.fp32_groups_has_gradients]
        # The backward pass accumulates into these buffers, the whole model's: copied where earlier micro-batches are in
        # them, zero otherwise.
        flats = z.fp32_groups_gradients_flat
        saved = [flat.clone() if any(flags) else None for flat, flags in zip(flats, has_gradients, strict=True)]
        z.clear_hp_grads()
        params = [p for group in z.bf16_groups for p in group]
        stash_grads(params)
        try:
            run()
            for param, total in zip(self.params, sums, strict=True):
                total.add_(self._reduced(param))
        finally:
            # not put back: the low-precision gradients are in the fp32 buffers already, and are cleared only once a
            # forward pass, so the task's backward pass would add them again
            for param in params:
                param.grad = None
            for flat, grads in zip(flats, saved, strict=True):
                flat.zero_() if grads is None else flat.copy_(grads)
            z.fp32_groups_has_gradients[:] = has_gradients

    def _reduced(self, param: nn.Parameter) -> Tensor:
        mapping = param._hp_mapping  # type: ignore[attr-defined]
        whole: Tensor = mapping.get_lp_grad_fragment(param._index_in_param_group)  # type: ignore[attr-defined]
        address = mapping.lp_fragment_address
        return whole.detach().view(-1).narrow(0, address.start, address.numel)

    def _before_step(self, *_: Any) -> None:
        """Gradients are reduced and clipped, nothing is updated yet; called once a step."""
        if self.on_gradients is not None:
            grads = [s.view(s.param.grad) for s in self.slices]  # type: ignore[arg-type]
            self._decide(grads, finite_norm(self.ds_optimizer._global_grad_norm))
