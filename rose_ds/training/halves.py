"""First-order risk without a second pass: how the gradients of a step's two halves of micro-batches differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rose_ds.config import RoseConfig
from rose_ds.engines.base import Engine
from rose_ds.errors import RefusedConfiguration
from rose_ds.exchange import all_sum

_PATIENCE = 3  # steps in a row of one micro-batch: an epoch may end with one


class Halves:
    """Two halves of a step differ in their dropout masks, as two passes do, and in their rows.

    What is ranked is ``|g - g_early * w / w_early|``, with the whole gradient g of a step before clipping, that of its
    first micro-batches, and the weights of both in the loss (how many micro-batches, or how many tokens): the
    difference of the halves' mean gradients, up to a factor that does not change ranks. It costs a copy of the reduced
    gradient in the middle of the step. Nothing keeps models without dropout from it.

    Raises:
        RefusedConfiguration: the engine reduces gradients at a step's end alone.
    """

    def __init__(self, engine: Engine) -> None:
        if not engine.tells_gradient_so_far:
            raise RefusedConfiguration(
                'first_order="halves" compares the gradients of a step\'s first and second half of micro-batches, and '
                f"the {engine.name} engine reduces none before the last one: use ZeRO stage 2 or 3, DDP or FSDP, or "
                'first_order="fast"'
            )
        self.engine = engine
        self.micro_batches = 0
        """Of the step under way, so far."""
        self.weight: Tensor | float = 0.0
        """Of these in the step's loss, on this rank."""
        self.early: Tensor | float | None = None
        """Of those that the kept gradient is of; None: none is kept."""
        self._without = 0
        """Steps in a row that had no halves."""

    def forget(self) -> None:
        """The step under way has ended, or failed."""
        self.micro_batches, self.weight, self.early = 0, 0.0, None

    def count(self, weight: Tensor | float, *, finds_risk: bool) -> None:
        """Before each micro-batch."""
        # After the first one too: a step at an epoch's end may have fewer micro-batches than the loop told.
        if finds_risk and self.micro_batches in {1, max(1, self.engine.accumulation_steps // 2)}:
            self.engine.keep_gradient_so_far()
            self.early = self.weight
        self.micro_batches += 1
        self.weight = self.weight + weight

    def difference(self, early: Sequence[Tensor], grads: Sequence[Tensor], scale: float) -> None:
        """Make the gradient that was kept into the difference, in place. A collective where weights are tensors.

        Args:
            early: fp32, 1-D, as ``Engine.take_risk_grads`` gives it.
            grads: of the whole step, as it lies in the optimizer.
            scale: what makes ``grads`` unscaled and unclipped.
        """
        assert self.early is not None
        if isinstance(self.weight, Tensor):
            first, all_of_them = all_sum(torch.stack([torch.as_tensor(self.early), self.weight])).tolist()
        else:
            first, all_of_them = float(self.early), self.weight
        for kept, grad in zip(early, grads, strict=True):
            kept.mul_(all_of_them / first if first else 0.0).add_(grad.to(kept.device), alpha=-scale)

    def check_there(self, *, there: bool) -> None:
        """Whether the step had halves.

        Raises:
            RuntimeError: so many steps in a row had none, so that nothing would ever be masked.
        """
        self._without = 0 if there else self._without + 1
        if self._without >= _PATIENCE:
            raise RuntimeError(
                f'first_order="halves" compares the two halves of a step, and {_PATIENCE} steps in a row had one '
                "micro-batch: accumulate gradients over two or more (smaller) micro-batches (prepare(..., "
                "accumulation_steps=2), --gradient_accumulation_steps 2, gradient_accumulation_steps in a DeepSpeed "
                'config), or use first_order="fast"'
            )


def halves_of(config: RoseConfig, engine: Engine) -> Halves | None:
    """Where the settings ask for it."""
    return Halves(engine) if config.uses_first and config.first_order == "halves" else None
