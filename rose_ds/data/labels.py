"""The labels of one's own rows: which rows have one, which classes there are, and each row's class."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rose_ds.data.errors import DataError
from rose_ds.data.tables import Rows
from rose_ds.data.tasks import loosely_spelled

logger = logging.getLogger(__name__)

_WHOLE = re.compile(r"([+-]?[0-9]{1,1000})(?:\.0*)?")
_TOO_MANY = 50
"""With more labels than this, half as many labels as rows are no classes."""
_UNLABELLED = "-1"
"""How data sets of the hub mark a row without a label."""
_WAY_OUT = "--drop_unlabelled leaves such rows out"


def labelled(rows: Rows, column: str) -> Rows:
    """The rows that have a label: neither an empty one nor -1.

    Raises:
        DataError: none has.
    """
    at = rows.column(column)
    kept = [(n, cells) for n, cells in rows.rows if not _empty(cells[at]) and _text(cells[at]) != _UNLABELLED]
    if not kept:
        raise DataError(f"{rows.path}: no row has a label in {column!r}: each is empty or {_UNLABELLED}")
    logger.info(
        "%s: %d of %d rows are dropped, whose label in %r is empty or %s",
        rows.path,
        len(rows.rows) - len(kept),
        len(rows.rows),
        column,
        _UNLABELLED,
    )
    return replace(rows, rows=kept)


def classes_in(rows: Rows, column: str) -> tuple[str, ...]:
    """The classes in a file.

    Raises:
        DataError: a row has no label, or the labels are no classes.
    """
    if rows.label_names is not None:
        return tuple(rows.label_names)
    values = list(map(_plain, labels_of(rows, column)))
    numbers = [_number(value) for value in values]
    if all(number is not None for number in numbers):
        for (line, _), value, number in zip(rows.rows, values, numbers, strict=True):
            if number is not None and not number.is_integer():
                raise DataError(
                    f"{rows.where(line)}: the labels in {column!r} are numbers such as {value}: regression is not "
                    "supported, for ROSE compares the distributions over classes of two passes (Eq. 1), and a number "
                    "has none. Make classes of them, or choose another --label_column"
                )
    distinct = set(values)
    if len(distinct) > _TOO_MANY and 2 * len(distinct) > len(values):
        raise DataError(
            f"{rows.path}: {column!r} has {len(distinct)} different values in {len(values)} rows, which are no classes "
            "(numbers to predict are regression, which is not supported): choose another --label_column"
        )
    if len(distinct) < 2:
        raise DataError(f"{rows.path}: {column!r} is {values[0]!r} in every row; a classifier needs two labels")
    names = tuple(sorted(distinct, key=lambda v: ((_number(v) or 0.0) if None not in numbers else 0.0, v)))
    if len(names) > 2 and names == tuple(str(i - 1) for i in range(len(names))):  # no error: moods may be -1, 0 and 1
        logger.warning(
            "%s: %r is %s in %d rows and 0 to %s in the others, and is taken for a class of its own. If it marks rows "
            "without a label: %s",
            rows.path,
            column,
            _UNLABELLED,
            values.count(_UNLABELLED),
            names[-1],
            _WAY_OUT,
        )
    return names


def labels_of(rows: Rows, column: str) -> list[str]:
    """Each row's label as a text. Raises DataError where a row has none."""
    at, found = rows.column(column), []
    for number, cells in rows.rows:
        value = cells[at]
        if _empty(value):
            raise DataError(f"{rows.where(number)}: no label in {column!r}: {_WAY_OUT}")
        if isinstance(value, (list, dict)):
            raise DataError(f"{rows.where(number)}: expected one label in {column!r}, found {value!r:.80}")
        if rows.label_names is not None:
            if not 0 <= value < len(rows.label_names):
                raise DataError(
                    f"{rows.where(number)}: no label in {column!r} ({value})"
                    + (f": {_WAY_OUT}" if str(value) == _UNLABELLED else "")
                )
            found.append(rows.label_names[value])
            continue
        found.append(str(value).lower() if isinstance(value, bool) else str(value).strip())
    return found


def class_ids(rows: Rows, column: str, labels: Sequence[str], *, ids: bool) -> list[int]:
    """Each row's class among ``labels``; the log says how many rows each has.

    Args:
        ids: the file may have the labels' ids in place of their names.

    Raises:
        DataError: a row has no label, or another.
    """
    values = labels_of(rows, column)
    id_of = _ids(labels)
    if ids and all(id_of(value) is None for value in values):
        id_of = _ids([str(i) for i in range(len(labels))])
    found = []
    for (number, _), value in zip(rows.rows, values, strict=True):
        label = id_of(value)
        if label is None:
            raise DataError(
                f"{rows.where(number)}: label {value!r} is not one of {', '.join(map(repr, labels)):.300}"
                + (f": {_WAY_OUT}" if _plain(value) == _UNLABELLED else "")
            )
        found.append(label)
    times = Counter(found)
    shares = ", ".join(f"{times[i]} {name!r}" for i, name in enumerate(labels))
    logger.info("%s: %d rows by label: %.400s", rows.path, len(found), shares)
    return found


def _empty(value: Any) -> bool:
    return value is None or value != value or not str(value).strip()  # a NaN is not itself


def _text(value: Any) -> str:
    return _plain(str(value).strip())


def _plain(label: str) -> str:
    """1, 01, +1 and 1.0 as one text, whatever the size; any other label as it is, 1e1 too."""
    whole = _WHOLE.fullmatch(label)
    return str(int(whole[1])) if whole else label


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    if "_" in text:  # a number to Python alone
        return None
    return value if math.isfinite(value) else None


def _ids(labels: Sequence[str]) -> Callable[[str], int | None]:
    """A label's id by its name; else as a whole number, else in another spelling, where that is of one label alone."""
    tables: list[tuple[Callable[[str], str], dict[str, int]]] = []
    for spelling in (str, _plain, loosely_spelled):
        names = [spelling(name) for name in labels]
        times = Counter(names)
        tables.append((spelling, {name: i for i, name in enumerate(names) if times[name] == 1}))

    def id_of(value: str) -> int | None:
        return next((ids[name] for spelling, ids in tables if (name := spelling(value)) in ids), None)

    return id_of
