"""Replaying the random numbers of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RngState:
    """State of torch's generators that a forward pass on this rank can draw from."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls) -> RngState:
        """The current state; the current CUDA device's too, where CUDA is in use."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
        return cls(torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Put the generators back to this state."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


@contextmanager
def replay(state: RngState) -> Iterator[None]:
    """Run with the generators at ``state``; afterwards the stream goes on as if the block had not run."""
    resume = RngState.now()
    state.restore()
    try:
        yield
    finally:
        resume.restore()
