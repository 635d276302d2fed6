"""What every engine offers the stepper."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from rose_ds.core.select import Shards
from rose_ds.core.threshold import Exchange
from rose_ds.engines.rng import RngState, replay
from rose_ds.optimizer import RoseAdamW, Slice

Forward = Callable[[], Tensor]
Loss = Callable[[Tensor], Tensor]
Divergence = Callable[[Tensor, Tensor], Tensor]


class Planner(Protocol):
    """Sets the optimizer's plan, once a step."""

    def __call__(self, grads: Sequence[Tensor], grad_norm: float | None, scale: Tensor | float = 1.0) -> None:
        """
        Args:
            grads: each eligible slice's task gradient, 1-D.
            grad_norm: its global norm before clipping, None where it is not known.
            scale: what the step still multiplies ``grads`` with (unscaling and clipping).
        """


#: Attributes under which wrappers keep the module they wrap: FSDP1, checkpoint_wrapper, torch.compile.
_WRAPPED_AS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


class RefusedConfiguration(ValueError):
    """A setting under which a step would silently be wrong. The message names it and the way out."""


@dataclass(frozen=True)
class Losses:
    """Detached, unscaled values of one micro-batch on this rank."""

    loss: Tensor
    kl: Tensor | None


@dataclass(frozen=True)
class Outcome:
    """What an engine knows after an optimizer step."""

    grad_norm: float | None
    skipped: bool


class Engine(ABC):
    """Two gradients of one micro-batch, and where the slices lie. Subclasses call ``_locate`` when they are set up."""

    name: str
    slices: list[Slice]
    shards: Shards

    def __init__(self, module: nn.Module, optimizer: RoseAdamW, accumulation_steps: int) -> None:
        self.module, self.optimizer, self.accumulation_steps = module, optimizer, accumulation_steps
        self._kl_grads: list[Tensor] | None = None
        if optimizer.config.uses_first:
            _refuse_checkpoints_without_rng(module)
        trainable = [name for name, param in self.named_parameters() if param.requires_grad]
        self.eligible = optimizer.config.eligible(trainable) if optimizer.config.strategy != "none" else []

    # --- an engine's three answers ---

    @abstractmethod
    def backward(self, forward: Forward, loss: Loss, divergence: Divergence | None) -> Losses:
        """Accumulate the task gradient where the engine keeps it and, given a divergence, the KL gradient apart."""

    @abstractmethod
    def step(self, plan: Planner) -> Outcome | None:
        """Count a micro-batch; at the accumulation boundary clip, call ``plan`` once, update and zero the gradients."""

    @abstractmethod
    def _find_slices(self, index: dict[str, int]) -> tuple[list[Slice], list[Exchange], list[Exchange]]:
        """This rank's slices of the names in ``index``, the exchange of each, and every exchange of the model."""

    @abstractmethod
    def gather_parameters(self) -> dict[str, Tensor]:
        """Full fp32 parameters by unwrapped name, on every rank. A collective."""

    # --- shared by all ---

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The model's parameters by their unwrapped names, in the model's order."""
        return [(unwrapped_name(name), param) for name, param in self.module.named_parameters()]

    def numel(self, param: nn.Parameter) -> int:
        """Number of elements of the whole parameter, sharded or not."""
        return param.numel()

    def beta1_of(self) -> dict[Tensor, float]:
        """beta1 of each tensor in the optimizer, from its group."""
        return {p: group["betas"][0] for group in self.optimizer.param_groups for p in group["params"]}

    def _locate(self) -> None:
        """Find the slices, check that the ranks hold every eligible element exactly once, tell the optimizer."""
        index = {name: i for i, name in enumerate(self.eligible)}
        self.slices, exchange_of, exchanges = self._find_slices(index)
        expected = sum(self.numel(p) for name, p in self.named_parameters() if name in index)
        found = 0
        for exchange in exchanges:
            local = sum(s.numel for s, e in zip(self.slices, exchange_of, strict=True) if e is exchange)
            found += int(exchange(torch.tensor([local])).sum())
        if found != expected:
            raise RefusedConfiguration(
                f"the {self.name} engine's ranks hold {found} eligible elements but the model has {expected}: "
                "parameters are missing from the optimizer, or are sharded in a way rose_ds does not know"
            )
        self.shards = Shards([s.tensor_index for s in self.slices], exchange_of, exchanges, len(index), expected)
        self.optimizer.attach(self.slices)

    def slice_grads(self) -> list[Tensor]:
        """Each slice's task gradient as it lies in the optimizer, 1-D; zeros for a parameter without one."""
        return [piece.grad() for piece in self.slices]

    def add_kl_grads(self, grads: Sequence[Tensor]) -> None:
        """Add one micro-batch's KL gradient: 1-D tensors aligned with ``slices``; fp32 ones may be kept as they are."""
        if self._kl_grads is None:
            self._kl_grads = [g.detach().float() for g in grads]
        else:
            # not in place: autograd may hand out one tensor as the gradient of two parameters
            for i, grad in enumerate(grads):
                self._kl_grads[i] = self._kl_grads[i] + grad

    def take_kl_grads(self) -> list[Tensor] | None:
        """The KL gradient summed over the accumulated micro-batches; forgets it."""
        grads, self._kl_grads = self._kl_grads, None
        return grads


def unwrapped_name(name: str) -> str:
    """A parameter's name in the model that was wrapped."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED_AS)


def _refuse_checkpoints_without_rng(module: nn.Module) -> None:
    """Activation checkpointing that draws other dropout masks when it recomputes differentiates another function."""
    for name, part in module.named_modules():
        for attribute in ("checkpoint_fn", "_gradient_checkpointing_func"):  # torch's wrapper, Hugging Face's layers
            function = getattr(part, attribute, None)
            if isinstance(function, partial) and function.keywords.get("preserve_rng_state") is False:
                raise RefusedConfiguration(
                    f"{unwrapped_name(name)!r} is checkpointed with preserve_rng_state=False: its dropout masks in the "
                    "backward pass are not those of the forward pass, so the gradients are wrong. Checkpoint with "
                    "preserve_rng_state=True; under accelerate's FSDP2 turn fsdp_activation_checkpointing off and use "
                    "gradient_checkpointing=True"
                )


def two_passes(forward: Forward, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Two forward passes with independent dropout: the first logits and the divergence between both."""
    first, second = forward(), forward()
    if torch.equal(first, second):
        raise RuntimeError(
            "two forward passes gave identical logits, so there is no first-order risk: call model.train() and use "
            'dropout > 0, or choose strategy="second"'
        )
    return first, divergence(first, second)


def same_pass_again(forward: Forward, state: RngState, first: Tensor) -> Tensor:
    """Run ``forward`` once more with the random numbers it had at ``state``; must reproduce ``first``."""
    with replay(state):
        again = forward()
    # NaN twice is the same pass: the step will be skipped, on all ranks
    if not torch.allclose(again.detach().float(), first.detach().float(), rtol=1e-3, atol=1e-3, equal_nan=True):
        raise RuntimeError(
            "a replayed forward pass gave other logits: forward() must depend only on the model, its inputs and "
            "torch's random numbers (no counters, numpy or python random numbers inside)"
        )
    return again
