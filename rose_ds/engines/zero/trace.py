"""Stage 3's order of modules, which a step of several passes would throw away in every micro-batch."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

_RELEASES = "_PartitionedParameterCoordinator__params_to_release"
_ATTEMPTS = 8  # a model whose passes go through other modules each time has no trace that lasts


class LongestTrace:
    """Has DeepSpeed record the longest stretch of a micro-batch, from one forward pass to the next.

    DeepSpeed gathers parameters ahead along a recorded trace, which begins with each forward pass, and throws it away
    when a stretch goes beyond it (partitioned_param_coordinator.py, trace_prologue). What it records next is the
    stretch that follows: a shorter one, if two dropout passes are pulled back before a third begins, and so for ever.
    The shorter ones begin as the longest does, so its trace serves all of them.
    """

    def __init__(self, module: nn.Module, coordinator: Any) -> None:
        self._coordinator = coordinator
        self._stretch = -1
        """Forward passes of this micro-batch so far, less one."""
        self._traced = False
        """Whether there was a trace when this stretch began."""
        self._longest: int | None = None
        """The stretch to record when it comes again."""
        self._attempts = _ATTEMPTS
        module.register_forward_pre_hook(self._before_forward, prepend=True)  # DeepSpeed's own begins the stretch

    def begin(self) -> None:
        """A micro-batch begins."""
        self._look()
        self._stretch = -1

    def _look(self) -> None:
        if self._traced and self._coordinator.is_invalid_trace():
            self._longest = self._stretch
        self._traced = False

    def _before_forward(self, *_: object) -> None:
        self._look()
        self._stretch += 1
        trace = self._coordinator
        if self._stretch == self._longest and self._attempts:
            self._longest, self._attempts = None, self._attempts - 1
            if not trace.is_invalid_trace():
                trace._invalidate_trace()  # a stretch that begins without one is recorded
            # What to release after a module is remembered by module and step, whatever the trace is by then: what a
            # shorter one said would have parameters gathered anew.
            inspect.getclosurevars(getattr(type(trace), _RELEASES)).nonlocals["func"].cache_clear()
        self._traced = not trace.is_invalid_trace()
