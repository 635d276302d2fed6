"""Records that training can do without: where one cannot be written, it is lost and training goes on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

_told: set[str] = set()


@contextmanager
def may_be_lost(path: Path | str) -> Iterator[None]:
    """Around the writing of a record: an OSError (a full disk, a removed folder) is logged, once for each path.

    A weight, a checkpoint and what a run measures in the end are no records: those raise.
    """
    try:
        yield
    except OSError as error:
        if str(path) not in _told:
            _told.add(str(path))
            logger.warning(
                "%s cannot be written (%s): training goes on, and what is not written there is lost",
                path,
                error.strerror or error,
            )


def append_line(path: Path, line: str) -> None:
    """Add a line to a record, all of it or nothing of it.

    Raises:
        OSError: there is no room, or the folder is gone.
    """
    before = path.stat().st_size
    try:
        with path.open("a", encoding="utf-8") as lines:
            lines.write(line + "\n")
    except OSError:
        os.truncate(path, before)  # half a line would damage those that come after it
        raise
