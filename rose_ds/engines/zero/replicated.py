"""Stage 0: every rank holds every gradient and state, and DeepSpeed all-reduces ``param.grad`` at the boundary."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from rose_ds.core.layout import Block
from rose_ds.engines.zero.adapter import Adapter, ScaledAdapter, stash_grads
from rose_ds.optimizer import RoseAdamW, Slice


class ReplicatedAdapter(Adapter):
    """Base: what is the same in every precision."""

    def __init__(self, ds: Any, rose_optimizer: RoseAdamW) -> None:
        super().__init__(ds, rose_optimizer)
        self._held = {param for group in rose_optimizer.param_groups for param in group["params"]}

    def _slice_of(self, name: str, tensor_index: int, param: nn.Parameter) -> Slice | None:
        master, n = self._master(param), param.numel()
        return Slice(name, tensor_index, master, 0, n, Block.flat(n, 0, n)) if master in self._held else None

    def backward_apart(self, run: Callable[[], None], sums: list[Tensor]) -> None:
        restore = stash_grads(self.ds.module.parameters())
        try:
            run()
            for param, total in zip(self.params, sums, strict=True):
                if param.grad is not None:
                    total.add_(param.grad.reshape(-1))
        finally:
            restore()

    def full_parameter(self, param: nn.Parameter) -> Tensor:
        return self._master(param).detach().float().clone()

    @abstractmethod
    def _master(self, param: nn.Parameter) -> Tensor:
        """What the optimizer updates in the place of a parameter of the model."""


class Fp32Adapter(ReplicatedAdapter):
    """The engine's optimizer is RoseAdamW itself, on the model's parameters."""

    def __init__(self, ds: Any, rose_optimizer: RoseAdamW) -> None:
        super().__init__(ds, rose_optimizer)
        self._norm: float | None = None
        rose_optimizer.register_step_pre_hook(self._before_step)

    def measure_norm(self) -> None:
        """DeepSpeed clips without telling the norm, so take it first."""
        grads = [p.grad for p in self.ds.module.parameters() if p.grad is not None]
        self._norm = get_total_norm(grads).item()

    def _before_step(self, *_: Any) -> None:
        """Gradients are reduced and clipped, nothing is updated yet."""
        if self.on_gradients is not None:
            self._decide([piece.grad() for piece in self.slices], self._norm)

    def _master(self, param: nn.Parameter) -> Tensor:
        return param


class UnfusedAdapter(ScaledAdapter, ReplicatedAdapter):
    """bf16 and fp16: DeepSpeed's FP16_UnfusedOptimizer over fp32 copies of the parameters."""

    def __init__(self, ds: Any, rose_optimizer: RoseAdamW) -> None:
        super().__init__(ds, rose_optimizer)
        self._masters: dict[nn.Parameter, Tensor] = {}
        for low, high in zip(self.ds_optimizer.fp16_groups, self.ds_optimizer.fp32_groups, strict=True):
            self._masters.update(zip(low, high, strict=True))
        self._undo_first_step()

    def _undo_first_step(self) -> None:
        """DeepSpeed's unfused optimizer creates the state with a step on zero gradients, which counts, and decays the
        weights: after it, bias correction would be one step ahead of every other engine's."""
        state = self.rose_optimizer.state
        moments = [state[high]["exp_avg_sq"] for high in self._masters.values()]
        if self.rose_optimizer.steps_taken() != 1 or any(moment.count_nonzero() for moment in moments):
            return
        for low, high in self._masters.items():
            state[high]["step"] = torch.zeros_like(state[high]["step"])
            high.data.copy_(low.data)

    def to_backward(self, loss: Tensor) -> Tensor:
        # engine.backward scales for ZeRO's optimizers alone, though this one's step unscales
        return loss * self.loss_scale

    def publish(self) -> None:
        for low, high in self._masters.items():
            low.data.copy_(high.data)

    def _master(self, param: nn.Parameter) -> Tensor:
        return self._masters.get(param, param)

    def _waiting(self, i: int) -> Tensor:
        return self.slices[i].grad()

    def _scaled_norm(self) -> Any:
        return self.ds_optimizer._global_grad_norm

    def _multiplier(self, norm: Any) -> Tensor | float:
        scale: Tensor | float = 1.0 / self.ds_optimizer.unscale_and_clip_grads(norm, apply_scale=False)
        return scale
