"""What differs between DeepSpeed's optimizers: where gradients lie, and when a step's plan can be made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rose_ds.optimizer import RoseAdamW, Slice

#: Receives each slice's gradient as the update will use it, and the unscaled norm before clipping.
Planned = Callable[[Sequence[Tensor], float | None], None]


class Adapter(ABC):
    """One of DeepSpeed's optimizer wrappers. Made once an engine; ``slices`` is filled in by ``find_slices``."""

    #: Whether two backward passes may share the first pass's graph; otherwise it is run again.
    shares_graph = True

    def __init__(self, engine: Any, base: RoseAdamW) -> None:
        self.engine, self.outer, self.base = engine, engine.optimizer, base
        self.slices: list[Slice] = []
        self.params: list[nn.Parameter] = []
        """The model's parameter behind each slice."""
        self.on_plan: Planned | None = None
        """Set while a step runs through the stepper."""

    def find_slices(self, index: dict[str, int]) -> list[Slice]:
        """This rank's slices of the named parameters."""
        for name, param in self.engine.module.named_parameters():
            if name in index:
                piece = self._slice_of(name, index[name], param)
                if piece is not None:
                    self.slices.append(piece)
                    self.params.append(param)
        return self.slices

    @abstractmethod
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that share out each tensor; None where every rank holds all of it."""

    @abstractmethod
    def kl_backward(self, run: Callable[[], None]) -> list[Tensor]:
        """Run a backward pass whose gradients end up nowhere but in the result, one 1-D tensor a slice."""

    def beta1_of(self) -> dict[Tensor, float]:
        """beta1 of each tensor that the optimizer steps; asked between steps."""
        return {p: group["betas"][0] for group in self.base.param_groups for p in group["params"]}

    def after_engine_step(self, skipped_by_plan: bool) -> None:
        """The engine's step is over. Where the KL gradient overflowed and the task gradient did not, DeepSpeed saw a
        good step: lower its dynamic loss scale here, or the next step overflows again."""
        if skipped_by_plan and getattr(self.outer, "dynamic_loss_scale", False):
            self.outer.loss_scaler.update_scale(True)

    def after_load(self) -> None:
        """DeepSpeed has loaded a checkpoint, which may be one of a run that had no states yet."""
        for group in self.base.param_groups:
            for param in group["params"]:
                self.base.init_state(param)

    @abstractmethod
    def full_parameter(self, param: nn.Parameter) -> Tensor:
        """The whole parameter in fp32, on every rank. A collective."""

    @abstractmethod
    def _slice_of(self, name: str, tensor_index: int, param: nn.Parameter) -> Slice | None: ...

    @property
    def loss_scale(self) -> float:
        """What gradients are multiplied with until the step; 1 but for fp16."""
        return float(getattr(self.outer, "loss_scale", 1.0))

    def _unscaled(self, grad: Tensor) -> Tensor:
        return grad if self.loss_scale == 1.0 else grad.float() / self.loss_scale


class LazyGrads(Sequence[Tensor]):
    """Gradients of the slices, computed when asked for: the scratch memory of one slice."""

    def __init__(self, count: int, get: Callable[[int], Tensor]) -> None:
        self._count, self._get = count, get

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, i: int) -> Tensor: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, i: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(i, slice):
            return [self._get(j) for j in range(self._count)[i]]
        if i >= self._count:
            raise IndexError(i)
        return self._get(i)


def finite_norm(norm: Any) -> float | None:
    """DeepSpeed's gradient norm as a float; its sentinel -1 for "not finite" becomes NaN."""
    if norm is None:
        return None
    value = float(norm)
    return value if value >= 0 else float("nan")


def stash_grads(params: Iterable[nn.Parameter]) -> Callable[[], None]:
    """Take ``grad`` and ``grad_accum`` off the parameters; the result puts them back."""
    saved = [(p, p.grad, getattr(p, "grad_accum", None)) for p in params]
    for p, _, accumulated in saved:
        p.grad = None
        if accumulated is not None:
            p.grad_accum = None  # type: ignore[attr-defined]

    def restore() -> None:
        for p, grad, accumulated in saved:
            p.grad = grad
            if hasattr(p, "grad_accum"):
                p.grad_accum = accumulated  # type: ignore[attr-defined]

    return restore


def scale_of_clipping(outer: Any, total_norm: Any) -> Tensor | float:
    """What DeepSpeed's ZeRO optimizers multiply gradients with in ``unscale_and_clip_grads``, same formula."""
    if outer.clip_grad > 0.0 and total_norm is not None:
        clip = ((total_norm / outer.loss_scale) + 1e-6) / outer.clip_grad
        return 1.0 / (torch.clamp(torch.as_tensor(clip), min=1.0) * outer.loss_scale)
    return 1.0 / outer.loss_scale
