"""Stage 0: every rank holds every gradient and state, and DeepSpeed all-reduces ``param.grad`` at the boundary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from rose_ds.engines.zero.adapter import Adapter, finite_norm, stash_grads
from rose_ds.optimizer import RoseAdamW, Slice


class ReplicatedAdapter(Adapter):
    """fp32: RoseAdamW itself. bf16 and fp16: DeepSpeed's unfused optimizer over fp32 copies of the parameters."""

    def __init__(self, engine: Any, base: RoseAdamW) -> None:
        super().__init__(engine, base)
        self._masters: dict[nn.Parameter, Tensor] = {}
        if self.outer is not base:
            for low, high in zip(self.outer.fp16_groups, self.outer.fp32_groups, strict=True):
                self._masters.update(zip(low, high, strict=True))
            self._undo_first_step()
        self._norm: float | None = None
        base.register_step_pre_hook(self._before_step)

    def _undo_first_step(self) -> None:
        """DeepSpeed's unfused optimizer creates the state with a step on zero gradients, which counts, and decays the
        weights: after it, bias correction would be one step ahead of every other engine's."""
        state = self.base.state
        if self.base.steps_taken() != 1 or any(state[m]["exp_avg_sq"].count_nonzero() for m in self._masters.values()):
            return
        for low, high in self._masters.items():
            state[high]["step"] = torch.zeros_like(state[high]["step"])
            high.data.copy_(low.data)

    def group(self) -> None:
        return None

    def _slice_of(self, name: str, tensor_index: int, param: nn.Parameter) -> Slice:
        return Slice(name, tensor_index, self._masters.get(param, param), 0, param.numel())

    def kl_backward(self, run: Callable[[], None]) -> list[Tensor]:
        restore = stash_grads(self.engine.module.parameters())
        try:
            run()
            return [
                torch.zeros_like(p).view(-1) if p.grad is None else self._unscaled(p.grad.reshape(-1))
                for p in self.params
            ]
        finally:
            restore()

    def measure_norm(self) -> None:
        """fp32 only: DeepSpeed clips without telling the norm, so take it first."""
        if self.outer is self.base:
            grads = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            self._norm = get_total_norm(grads).item()

    def _before_step(self, *_: Any) -> None:
        """Gradients are reduced, unscaled and clipped, nothing is updated yet."""
        if self.on_plan is None:
            return
        norm = self._norm if self.outer is self.base else finite_norm(self.outer._global_grad_norm)
        self.on_plan([piece.grad() for piece in self.slices], norm)

    def full_parameter(self, param: nn.Parameter) -> Tensor:
        return self._masters.get(param, param).detach().float().clone()
