"""What a loop may do to a step between its calls: drop it, clip it, never make it. Seen before it is trained on."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from rose_ds.engines.base import Engine
from rose_ds.optimizer import local

logger = logging.getLogger(__name__)

_PATIENCE = 64  # last micro-batches that a loop may announce before it steps
_DROPPED = 8  # steps in a row that a loop may drop half-way


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """On this rank, which may hold nothing."""
    return bool(torch.isfinite(get_total_norm([t for t in tensors if t.numel()], float("inf"))))


class LoopWatch:
    """Told of every call of a stepper.

    Args:
        needs_clip: why the factor must be known by which the gradient is clipped; empty where it does not matter.
    """

    def __init__(self, engine: Engine, needs_clip: str) -> None:
        self.engine, self.needs_clip = engine, needs_clip
        self._awaiting_step = False
        """Between a backward() and its step()."""
        self._gradients_wait = False
        """After the last micro-batch."""
        self._half_way, self._dropped = False, 0
        """Whether a step has begun that is not made yet; and how many of these were dropped in a row."""
        self._unstepped = 0
        """Last micro-batches since the optimizer stepped."""
        self._versions: list[int] = []
        self._told: set[str] = set()

    def before_backward(self) -> None:
        """Raises RuntimeError where step() is due, or cannot come any more."""
        if self._awaiting_step:
            raise RuntimeError("call step() after every backward(), also off the accumulation boundary")
        if self.engine.failure is not None:
            raise RuntimeError(
                f"an earlier backward() or step() failed ({self.engine.failure}) while the {self.engine.name} engine "
                "held its gradients half-way, and it cannot go on: build model and engine anew, or resume the run"
            )
        if self.needs_clip:
            self.engine.check_sums()

    def dropped(self) -> bool:
        """Whether the loop has dropped the gradients of a step under way."""
        if not self.engine.gradients_may_be_dropped:
            return False
        optimizer = self.engine.optimizer
        dropped = optimizer.zeroed or (self._gradients_wait and not self.engine.has_gradients())
        optimizer.zeroed = False
        if dropped:
            self._dropped += self._half_way
            self._half_way = False
        return dropped

    def check_progress(self) -> None:
        """Raises RuntimeError where every step is dropped before it is made."""
        if self._dropped >= _DROPPED:
            self._dropped = 0  # a loop that is mended may go on
            raise RuntimeError(
                f"gradients were dropped between the micro-batches of a step {_DROPPED} times in a row, so that no "
                "step is ever made (zero_grad() in every iteration?): leave zero_grad() out, step() does it when "
                "accumulation_steps micro-batches are there"
            )

    def after_backward(self) -> None:
        """A micro-batch's gradients are there."""
        self._awaiting_step = True
        self._gradients_wait = self.engine.gradients_may_be_dropped and self.engine.has_gradients()
        self._versions = self._gradient_versions() if self.needs_clip else []

    def begin_step(self, name: str) -> None:
        """Raises RuntimeError where there is nothing to step."""
        if not self._awaiting_step:
            raise RuntimeError(f"{name}() must follow a backward()")
        self._awaiting_step = False

    def check_untouched(self) -> None:
        """Raises RuntimeError where the loop has clipped what ``step()`` is to compare."""
        if self.needs_clip and self._versions != self._gradient_versions():
            raise RuntimeError(
                f"{self.needs_clip}, and gradients were changed between backward() and step() (clip_grad_norm_?): let "
                "prepare(max_grad_norm=...) clip"
            )

    def stepped(self, *, whole: bool) -> None:
        """A step was made, or but a micro-batch of it counted."""
        self._half_way = not whole
        if whole:
            self._dropped = self._unstepped = 0

    def left_to_optimizer(self, *, last: bool) -> None:
        """The loop has announced that it steps by itself; told once where that does not come."""
        self._unstepped += last
        if self._unstepped > max(_PATIENCE, 2 * self.engine.accumulation_steps):
            self.tell(
                "unstepped",
                f"{self._unstepped} last micro-batches and not one optimizer.step() of this RoseAdamW: is it another "
                "optimizer, or a wrapper of it, that the loop steps?",
            )

    def gradients_are_finite(self) -> bool:
        """On this rank; of all that the optimizer holds here, which may be nothing."""
        held = [p.grad for group in self.engine.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return all_finite(map(local, held))

    def tell(self, what: str, message: str) -> None:
        """Once a run."""
        if what not in self._told:
            self._told.add(what)
            logger.warning("%s (optimizer step %d; told once)", message, self.engine.optimizer.steps_taken() + 1)

    def _gradient_versions(self) -> list[int]:
        """Of the eligible gradients that wait in the parameters: what changes one in place counts its up."""
        held = dict.fromkeys(piece.param for piece in self.engine.slices)
        return [p.grad._version for p in held if p.grad is not None]
