"""What differs between DeepSpeed's optimizers: where gradients lie, and when a step's plan can be made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rose_ds.engines.base import Decision, unwrapped_name
from rose_ds.engines.torch.plain import clip_factor
from rose_ds.optimizer import RoseAdamW, Slice


class Adapter(ABC):
    """One of DeepSpeed's optimizer wrappers. Made once an engine, which then attaches the eligible slices."""

    #: Whether two backward passes may share the first pass's graph; otherwise it is run again.
    shares_graph = True
    #: Whether a gradient that is kept apart is only reduced in a backward pass at an accumulation boundary.
    reduces_at_boundary = True
    #: Whether this rank's slices of the gradient are reduced after each micro-batch, and not at a step's end alone.
    reduces_each_micro_batch = False

    def __init__(self, ds: Any, rose_optimizer: RoseAdamW) -> None:
        self.ds, self.ds_optimizer, self.rose_optimizer = ds, ds.optimizer, rose_optimizer
        self.slices: list[Slice] = []
        """Of the eligible parameters."""
        self.params: list[nn.Parameter] = []
        """The model's parameter behind each of these."""
        self.on_gradients: Decision | None = None
        """Set while a step runs through the stepper."""

    def find_slices(self, names: Sequence[str]) -> list[tuple[Slice, nn.Parameter]]:
        """This rank's slices of the named parameters, each with the model's parameter."""
        index = {name: i for i, name in enumerate(names)}
        every = ((unwrapped_name(name), p) for name, p in self.ds.module.named_parameters())
        named = [(name, p) for name, p in every if name in index]
        found = [(self._slice_of(name, index[name], param), param) for name, param in named]
        return [(piece, param) for piece, param in found if piece is not None]

    def attach(self, found: Sequence[tuple[Slice, nn.Parameter]]) -> None:
        """Say which slices are eligible."""
        self.slices, self.params = [piece for piece, _ in found], [param for _, param in found]

    def risk_sums(self) -> list[Tensor]:
        """Zeros to add the gradient kept apart to, fp32, one 1-D tensor a slice, where the optimizer's state lies."""
        return [torch.zeros(piece.numel, device=piece.param.device) for piece in self.slices]

    @abstractmethod
    def backward_apart(self, run: Callable[[], None], sums: list[Tensor]) -> None:
        """Run a backward pass whose gradients end up nowhere but in ``sums``, still multiplied by the loss scale."""

    def so_far(self, i: int) -> Tensor:
        """Between two micro-batches, where ``reduces_each_micro_batch``: a slice's task gradient, still scaled; 1-D."""
        raise NotImplementedError

    def micro_batch(self) -> AbstractContextManager[object]:
        """Around all passes of one."""
        return nullcontext()

    def after_step(self) -> None:  # noqa: B027  most have nothing to do
        """After an optimizer step, or one that was skipped."""

    def rearmed(self) -> Callable[[], None]:
        """Called after a forward pass; the result is called before the backward pass of it."""
        return lambda: None

    def beta1_of(self) -> dict[Tensor, float]:
        """beta1 of each tensor that the optimizer steps; asked between steps."""
        return {p: group["betas"][0] for group in self.rose_optimizer.param_groups for p in group["params"]}

    def to_backward(self, loss: Tensor) -> Tensor:
        """What to give to DeepSpeed's ``engine.backward``, which applies the loss scale."""
        return loss

    def after_load(self) -> None:
        """DeepSpeed has loaded a checkpoint, which may be one of a run that had no states yet."""
        for group in self.rose_optimizer.param_groups:
            for param in group["params"]:
                self.rose_optimizer.init_state(param)

    def publish(self) -> None:
        """Bring the fp32 weights that the optimizer holds to the parameters that forward passes use."""
        if hasattr(self.ds_optimizer, "update_lp_params"):  # ZeRO 1 and 2, BF16_Optimizer
            self.ds_optimizer.update_lp_params()

    @abstractmethod
    def full_parameter(self, param: nn.Parameter) -> Tensor:
        """The whole parameter in fp32, on every rank. A collective."""

    @abstractmethod
    def _slice_of(self, name: str, tensor_index: int, param: nn.Parameter) -> Slice | None: ...

    @property
    def loss_scale(self) -> float:
        """What gradients are multiplied with until the step; 1 but for fp16."""
        return float(getattr(self.ds_optimizer, "loss_scale", 1.0))

    def _decide(
        self, grads: Sequence[Tensor], norm: float | None, scale: Tensor | float = 1.0, clip: float | None = None
    ) -> bool:
        """Have the step's plan made; whether it is to skip. DeepSpeed then counts a skipped step, and its lr waits."""
        assert self.on_gradients is not None
        decide, self.on_gradients = self.on_gradients, None
        # a checkpoint's clip_grad goes before the config's (BF16_Optimizer); ZeRO-0 in fp32 has no such attribute
        limit = getattr(self.ds_optimizer, "clip_grad", self.ds.gradient_clipping())
        decide(grads, norm, scale, clip_factor(norm, limit) if clip is None else clip)
        self.ds_optimizer.overflow = self.rose_optimizer.skips
        return bool(self.ds_optimizer.overflow)


class ScaledAdapter(Adapter):
    """Base for DeepSpeed's optimizers that know a loss scale (1 but for fp16).

    They call their ``_update_scale`` once a step, on every rank alike: gradients are reduced and their norm is known,
    nothing is unscaled, clipped or updated yet, and whether the step is skipped is about to be decided. The plan is
    made there, so that a gradient kept apart that overflowed is to DeepSpeed what an overflow of the task gradient is.
    """

    def __init__(self, ds: Any, rose_optimizer: RoseAdamW) -> None:
        super().__init__(ds, rose_optimizer)
        self._update_scale = self.ds_optimizer._update_scale
        self.ds_optimizer._update_scale = self._decide_and_update_scale

    @abstractmethod
    def _waiting(self, i: int) -> Tensor:
        """A slice's task gradient as it waits for the step: reduced, neither unscaled nor clipped; 1-D, not a copy."""

    @abstractmethod
    def _scaled_norm(self) -> Any:
        """Norm of these gradients; None where DeepSpeed does not compute it."""

    def _multiplier(self, norm: Any) -> Tensor | float:
        """What the step multiplies gradients with. DeepSpeed's formula, to the last bit."""
        outer = self.ds_optimizer
        if outer.clip_grad > 0.0 and norm is not None:
            clip = ((norm / outer.loss_scale) + 1e-6) / outer.clip_grad
            return 1.0 / (torch.clamp(torch.as_tensor(clip), min=1.0) * outer.loss_scale)
        return 1.0 / outer.loss_scale

    def _decide_and_update_scale(self, overflow: bool) -> None:
        if overflow or self.on_gradients is None:
            self._update_scale(overflow)
            return
        scaler = vars(getattr(self.ds_optimizer, "loss_scaler", None) or self.ds_optimizer.loss_scale_config)
        before, norm, scale_of_grads = dict(scaler), self._scaled_norm(), self.loss_scale
        unscaled_norm = None if norm is None else finite_norm(norm / self.ds_optimizer.loss_scale)
        # First as after a good step: where the scale grows now, DeepSpeed unscales with the new one.
        self._update_scale(False)
        waiting = [self._waiting(i) for i in range(len(self.slices))]
        multiplier = self._multiplier(norm)
        if self._decide(waiting, unscaled_norm, multiplier, float(multiplier) * scale_of_grads):
            scaler.update(before)
            self._update_scale(True)


def finite_norm(norm: Any) -> float | None:
    """DeepSpeed's gradient norm as a float; its sentinel -1 for "not finite" becomes NaN."""
    if norm is None:
        return None
    value = float(norm)
    return value if value >= 0 else float("nan")


def clear_grads(partitions: Iterable[Tensor]) -> None:
    """Of offloaded partitions: DeepSpeed copies into them what a step reaches, and clears nothing."""
    for partition in partitions:
        partition.grad.zero_()  # type: ignore[union-attr]  # an offloaded partition has one


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
