"""Replaying the random numbers of a forward pass."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RngState:
    """State of torch's generators that a forward pass on this rank can draw from."""

    cpu: Tensor
    accelerator: Tensor | None

    @classmethod
    def now(cls) -> RngState:
        """The current state; the current accelerator's too, where one is in use."""
        device = _device_module()
        return cls(torch.get_rng_state(), None if device is None else device.get_rng_state())

    def restore(self) -> None:
        """Put the generators back to this state."""
        torch.set_rng_state(self.cpu)
        device = _device_module()
        if self.accelerator is not None and device is not None:
            device.set_rng_state(self.accelerator)


@dataclass(frozen=True)
class AllRandom:
    """State of every generator that code around a model may draw from: torch's, numpy's and Python's."""

    torchs: RngState
    numpys: Any
    pythons: Any

    @classmethod
    def now(cls) -> AllRandom:
        """The current state."""
        return cls(RngState.now(), np.random.get_state(), random.getstate())

    def restore(self) -> None:
        """Put the generators back to this state."""
        self.torchs.restore()
        np.random.set_state(self.numpys)
        random.setstate(self.pythons)


def _device_module() -> Any | None:
    """torch.cuda, torch.mps, ...; None where nothing has run there yet."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return None
    module: Any = torch.get_device_module(found)
    started: bool = getattr(module, "is_initialized", lambda: True)()
    return module if started else None


@contextmanager
def replay(state: RngState) -> Iterator[None]:
    """Run with the generators at ``state``; afterwards the stream goes on as if the block had not run."""
    resume = RngState.now()
    state.restore()
    try:
        yield
    finally:
        resume.restore()
