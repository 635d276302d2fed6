"""Which rows go to validation where a source has no dev set of its own."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from datasets import Dataset

from rose_ds.data.errors import DataError
from rose_ds.data.tasks import TaskSpec

logger = logging.getLogger(__name__)

VALIDATION_ONE_IN = 10
"""One text in so many, chosen by its hash."""


def in_validation(text: str) -> bool:
    """By a row's text alone, so that a text that occurs twice is never on both sides."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") % VALIDATION_ONE_IN == 0


def set_aside(rows: Dataset, spec: TaskSpec, path: Path, columns: tuple[str, ...]) -> tuple[Dataset, Dataset]:
    """Training rows, and those set aside for validation. Of pairs the first text alone decides: a question with ten
    answers is ten pairs, and with some of them on either side validation would measure what was learnt by heart.

    Args:
        path, columns: the file and its columns of texts, for messages.

    Raises:
        DataError: a side would be empty.
    """
    texts = rows[spec.fields[0]][:]
    sides: tuple[list[int], list[int]] = ([], [])
    for i, text in enumerate(texts):
        sides[in_validation(text)].append(i)
    train, validation = sides
    if not train or not validation:
        other = f", or put the other text first (--text_columns {columns[1]} {columns[0]})" if columns[1:] else ""
        raise DataError(
            f"{path} has too few different texts in {columns[0]!r} ({len(set(texts))} in {len(texts)} rows) to set "
            f"some aside for validation: give --validation_file{other}"
        )
    logger.info(
        "no validation file: %d of %d rows are set aside for it, by a hash of %r",
        len(validation),
        len(rows),
        columns[0],
    )
    return rows.select(train), rows.select(validation)
