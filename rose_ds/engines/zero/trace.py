"""Stage 3's order of modules, which a step of several passes would throw away in every micro-batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_PREFIX = "_PartitionedParameterCoordinator__"
_ATTEMPTS = 8  # a model whose passes go through other modules each time has no trace that lasts
_OURS = "_rose_ds_hook"


class LongestTrace:
    """Has DeepSpeed record the longest stretch of a micro-batch, from one forward pass to the next.

    DeepSpeed gathers parameters ahead along a recorded trace, which begins with each forward pass, and throws it away
    when a stretch goes beyond it (partitioned_param_coordinator.py, trace_prologue). What it records next is the
    stretch that follows: a shorter one, if two dropout passes are pulled back before a third begins, and so for ever.
    The shorter ones begin as the longest does, so its trace serves all of them.
    """

    def __init__(self, module: nn.Module, coordinator: Any) -> None:
        self._trace = coordinator
        self._stretch: int | None = None
        """The number of the micro-batch's last forward pass, from 0; None outside, for evaluations are DeepSpeed's."""
        self._traced = False
        """Whether there was a trace when this stretch began."""
        self._wanted: tuple[int, int] | None = None
        """The stretch to record when it comes again, and how many modules it went through."""
        self._attempts = _ATTEMPTS
        earlier = getattr(coordinator, _OURS, None)
        if earlier is not None:  # of another prepare()
            earlier.remove()
        hook = module.register_forward_pre_hook(lambda *_: self._before_forward(), prepend=True)  # before DeepSpeed's
        setattr(coordinator, _OURS, hook)

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around its passes."""
        self._stretch = -1
        try:
            yield
        finally:
            self._look()
            self._stretch = None

    def _look(self) -> None:
        """What has become of the trace in a stretch that ends."""
        length: int = getattr(self._trace, _PREFIX + "step_id")
        if self._stretch is not None and self._traced and self._trace.is_invalid_trace():
            self._wanted = self._stretch, length
        elif self._wanted is not None and self._trace.is_record_trace() and length >= self._wanted[1]:
            self._wanted = None  # DeepSpeed has just recorded one that will do
        self._traced = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_forward(self) -> None:
        if self._stretch is None:
            return
        self._look()
        self._stretch += 1
        if self._wanted is not None and self._stretch == self._wanted[0] and self._attempts:
            self._wanted, self._attempts = None, self._attempts - 1
            if not self._trace.is_invalid_trace():
                self._trace._invalidate_trace()  # a stretch that begins without one is recorded
            # What to release after a module is remembered by module and step, whatever the trace is by then: what a
            # shorter one said would have parameters gathered anew.
            releases = getattr(type(self._trace), _PREFIX + "params_to_release")
            inspect.getclosurevars(releases).nonlocals["func"].cache_clear()
        self._traced = not self._trace.is_invalid_trace()
