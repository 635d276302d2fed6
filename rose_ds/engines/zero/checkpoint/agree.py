"""One outcome on all ranks: none waits for another that has failed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

logger = logging.getLogger(__name__)
T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be loaded. Raised on every rank alike; the message names the file or the difference."""


def warn(message: str) -> None:
    """Log once, not on every rank."""
    if dist.get_rank() == 0:
        logger.warning(message)


def on_first_rank(run: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """The result of rank 0, sent to every rank; what it raises, every rank raises as CheckpointError."""
    answer: list[Any] = [None, None]
    cause: Exception | None = None
    if dist.get_rank() == 0:
        try:
            answer[0] = run()
        except Exception as error:
            cause, answer[1] = error, _message(error)
    dist.broadcast_object_list(answer, src=0, group=group)
    if answer[1] is not None:
        raise CheckpointError(answer[1]) from cause
    result: T = answer[0]
    return result


def everywhere(run: Callable[[], T], note: str = "") -> T:
    """This rank's result; what any rank raises, every rank raises as CheckpointError, with ``note`` at its end."""
    result: Any = None
    cause: Exception | None = None
    try:
        result = run()
    except Exception as error:
        cause = error
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if cause is None else _message(cause))
    for rank, message in enumerate(messages):
        if message is not None:
            raise CheckpointError(f"{message} (rank {rank}){note}") from cause
    checked: T = result
    return checked


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
