"""One outcome on all ranks: none waits for another that has failed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from rose_ds.errors import RefusedConfiguration

logger = logging.getLogger(__name__)
T = TypeVar("T")


class _Outcome(NamedTuple):
    """What a rank has to tell the others: a result, or why there is none."""

    result: Any = None
    error: str | None = None
    refused: bool = False


def warn(message: str) -> None:
    """Log once, not on every rank."""
    if dist.get_rank() == 0:
        logger.warning(message)


def on_first_rank(run: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """The result of rank 0, sent to every rank; what it raises, every rank raises (see ``everywhere``)."""
    outcome, cause = _Outcome(), None
    if dist.get_rank() == 0:
        outcome, cause = _attempt(run)
    sent = [outcome]
    dist.broadcast_object_list(sent, src=0, group=group)
    _raise_first(sent, cause)
    result: T = sent[0].result
    return result


def everywhere(run: Callable[[], T], note: str = "") -> T:
    """This rank's result.

    Raises:
        RefusedConfiguration: on every rank, if one raised it.
        RuntimeError: on every rank, if one raised anything else; ``note`` is added.
    """
    outcome, cause = _attempt(run)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome._replace(result=None))
    _raise_first(outcomes, cause, note)
    result: T = outcome.result
    return result


def _attempt(run: Callable[[], Any]) -> tuple[_Outcome, Exception | None]:
    try:
        return _Outcome(run()), None
    except RefusedConfiguration as error:
        return _Outcome(error=str(error), refused=True), error
    except Exception as error:  # whatever it is, the other ranks must hear of it
        return _Outcome(error=f"{type(error).__name__}: {error}"), error


def _raise_first(outcomes: Sequence[_Outcome], cause: Exception | None, note: str = "") -> None:
    for rank, outcome in enumerate(outcomes):
        if outcome.error is not None:
            if outcome.refused:
                raise RefusedConfiguration(outcome.error) from cause
            raise RuntimeError(f"rank {rank}: {outcome.error}{note}") from cause
