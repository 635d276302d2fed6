"""A classification task of one's own files: which columns are texts, what the labels are, and a dev set."""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from rose_ds.data.errors import DataError
from rose_ds.data.glue_folder import UNTEXT, read_adversarial, task_features
from rose_ds.data.held_out import in_validation
from rose_ds.data.hub import load_named
from rose_ds.data.loading import SPLITS, TaskData
from rose_ds.data.tables import Rows, read_rows, rows_of
from rose_ds.data.tasks import TaskSpec, find_task, loosely_spelled

logger = logging.getLogger(__name__)

#: Tried in this order where nobody says which columns are texts: pairs first, for half of one is another task.
USUAL_TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
    ("review",),
)
#: What the texts are called from here on: a column of a file may have any name, also "label" or "idx".
OWN_TEXTS = ("text", "text_pair")
_WHOLE = re.compile(r"([+-]?[0-9]{1,1000})(?:\.0*)?")
_TOO_MANY = 50
"""With more labels than this, half as many labels as rows are no classes."""


@dataclass(frozen=True)
class Files:
    """Where a task lies, and how it is laid out."""

    train: Path | None = None
    validation: Path | None = None
    dataset: str | None = None
    """In place of both: NAME or NAME:CONFIG on the hub, with a split "train" and, if it has one, "validation"."""
    adversarial: Path | None = None
    """Of the same layout; or, for a task of GLUE, AdvGLUE's or AdvGLUE++'s JSON: a file or a folder of them."""
    text_columns: tuple[str, ...] | None = None
    label_column: str = "label"
    encoding: str = "utf-8"


def load_files(
    files: Files, task: str | None = None, labels: Sequence[str] | None = None, splits: Sequence[str] = SPLITS
) -> TaskData:
    """Read a task from files.

    Args:
        task: what to call it; one of GLUE's brings its own columns and labels. None: the file's name.
        labels: the label names, in the order of their ids, of a trained model; None: those of the training file, in
            numerical or alphabetical order.
        splits: which to read; validation is a part of the training file where it has no file of its own.

    Raises:
        DataError: a file cannot be read, a row has no text or label, or the labels are no classes; names file and line.
    """
    glue = find_task(task) if task else None
    named = files.train or files.validation or files.adversarial
    if files.dataset is not None:
        if files.train or files.validation:
            raise DataError("--dataset brings its own rows: leave --train_file and --validation_file out")
        named = Path(files.dataset.partition(":")[0])
        splits_of = load_named(files.dataset)
        train, validation = (
            rows_of(splits_of[name], Path(f"{files.dataset}[{name}]"), files.label_column)
            if name in splits_of
            else None
            for name in ("train", "validation")
        )
    else:
        train, validation = _read(files.train, files), _read(files.validation, files)
    if named is None:
        raise DataError("no file: give --train_file, or for evaluation --validation_file")
    json_sets = glue is not None and _is_advglue(files)
    adversarial = None if json_sets else _read(files.adversarial, files)
    first = train or validation
    if first is None:
        raise DataError("an adversarial file alone is no task: give --train_file or --validation_file too")
    columns = _columns(files, first, glue)
    if glue is not None:
        spec = TaskSpec(glue.name, glue.fields, glue.labels, adv_key=glue.adv_key)
    else:
        known = _label_names(first, files.label_column) if labels is None else tuple(labels)
        spec = TaskSpec(task or named.stem, OWN_TEXTS[: len(columns)], known)
    ids = glue is not None or labels is not None
    found: dict[str, Dataset | None] = {}
    for name, rows in (("train", train), ("validation", validation), ("adversarial", adversarial)):
        found[name] = None if rows is None else _dataset(rows, columns, files.label_column, spec, ids=ids)
    if json_sets and files.adversarial is not None:
        found["adversarial"] = read_adversarial(spec, files.adversarial)
    if found["validation"] is None and found["train"] is not None:
        found["train"], found["validation"] = _split(found["train"], spec, first.path)
    return TaskData(spec, **{name: rows for name, rows in found.items() if name in splits})


def with_adversarial(data: TaskData, files: Files) -> TaskData:
    """A task from elsewhere with the adversarial set of a file or folder.

    Raises:
        DataError: as ``load_files``.
    """
    assert files.adversarial is not None
    if data.spec.adv_key is not None and _is_advglue(files):
        return replace(data, adversarial=read_adversarial(data.spec, files.adversarial))
    rows = _read(files.adversarial, files)
    assert rows is not None
    columns = _columns(files, rows, data.spec)
    return replace(data, adversarial=_dataset(rows, columns, files.label_column, data.spec, ids=True))


def _read(path: Path | None, files: Files) -> Rows | None:
    return None if path is None else read_rows(path, files.encoding, files.label_column)


def _is_advglue(files: Files) -> bool:
    """Whether the adversarial set is AdvGLUE's or AdvGLUE++'s: a folder, or a .json file that is one object of tasks;
    rows of one's own are a list, or an object a line.
    """
    path = files.adversarial
    if path is None or path.suffix.lower() != ".json" or path.is_dir():
        return path is not None and path.is_dir()
    try:
        content = path.read_bytes()
    except OSError:
        return False  # whoever reads it says what is wrong
    # what stands between the quotes does not matter here, so neither does its encoding
    text = content.decode(json.detect_encoding(content), "replace").strip()
    try:
        first, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return not text.startswith("[")  # damaged: AdvGLUE's reader names the line in the whole file
    return end == len(text) and isinstance(first, dict) and files.label_column not in first  # with it: a single row


def _columns(files: Files, rows: Rows, known: TaskSpec | None) -> tuple[str, ...]:
    """The columns with texts."""
    if files.text_columns:
        wanted = len(known.fields) if known else min(2, len(files.text_columns))
        if len(files.text_columns) != wanted or files.label_column in files.text_columns:
            raise DataError(
                f"text_columns={list(files.text_columns)}: expected "
                + (f"{wanted} columns, as task {known.name} has texts" if known else "one column or two")
                + f", and not the label column {files.label_column!r}"
            )
        return files.text_columns
    if known is not None:
        return known.fields
    for names in USUAL_TEXTS:
        if all(name in rows.names for name in names) and files.label_column not in names:
            logger.info("%s: the texts are %s; others with --text_columns", rows.path, " and ".join(map(repr, names)))
            return names
    raise DataError(
        f"{rows.path}: which columns are the texts? Say it with --text_columns A [B]; found: "
        f"{', '.join(map(repr, rows.names)):.400}"
    )


def _label_names(rows: Rows, column: str) -> tuple[str, ...]:
    """The classes in a file."""
    if rows.label_names is not None:
        return tuple(rows.label_names)
    values = list(map(_plain, _labels(rows, column)))
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
    return tuple(sorted(distinct, key=lambda v: ((_number(v) or 0.0) if None not in numbers else 0.0, v)))


def _labels(rows: Rows, column: str) -> list[str]:
    """Each row's label as a text."""
    at, found = rows.column(column), []
    for number, cells in rows.rows:
        value = cells[at]
        if value is None or value != value or not str(value).strip():  # a NaN is not itself
            raise DataError(f"{rows.where(number)}: no label in {column!r}")
        if isinstance(value, (list, dict)):
            raise DataError(f"{rows.where(number)}: expected one label in {column!r}, found {value!r:.80}")
        if rows.label_names is not None:
            if not 0 <= value < len(rows.label_names):  # -1 is how data sets of the hub mark an unlabelled row
                raise DataError(f"{rows.where(number)}: no label in {column!r} ({value}): leave such rows out")
            found.append(rows.label_names[value])
            continue
        found.append(str(value).lower() if isinstance(value, bool) else str(value).strip())
    return found


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


def _dataset(rows: Rows, texts: Sequence[str], label_column: str, spec: TaskSpec, *, ids: bool) -> Dataset:
    """``ids``: the file may have the labels' ids in place of their names."""
    at = [rows.column(name) for name in texts]
    columns: dict[str, list[Any]] = {name: [] for name in (*spec.fields, "label", "idx")}
    values = _labels(rows, label_column)
    id_of = _ids(spec.labels)
    if ids and all(id_of(value) is None for value in values):
        id_of = _ids([str(i) for i in range(len(spec.labels))])
    for (number, cells), value in zip(rows.rows, values, strict=True):
        label = id_of(value)
        if label is None:
            raise DataError(
                f"{rows.where(number)}: label {value!r} is not one of {', '.join(map(repr, spec.labels)):.300}"
            )
        for field, column, position in zip(spec.fields, texts, at, strict=True):
            text = cells[position]
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"{rows.where(number)}: expected a text in {column!r}, found {text!r:.80}")
            if UNTEXT.search(text):
                raise DataError(f"{rows.where(number)}: {column!r} has a NUL or half a surrogate pair: {text!r:.80}")
            columns[field].append(text)
        columns["label"].append(label)
        columns["idx"].append(len(columns["idx"]))
    return Dataset.from_dict(columns, features=task_features(spec))


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


def _split(rows: Dataset, spec: TaskSpec, path: Path) -> tuple[Dataset, Dataset]:
    """Training rows, and those set aside for validation."""
    sides: tuple[list[int], list[int]] = ([], [])
    for i, row in enumerate(rows):
        sides[in_validation(*(row[field] for field in spec.fields))].append(i)
    train, validation = sides
    if not train or not validation:
        raise DataError(
            f"{path} has too few rows ({len(rows)}) to set some aside for validation: give --validation_file"
        )
    logger.info(
        "no validation file: %d of %d rows are set aside for it, by a hash of the text", len(validation), len(rows)
    )
    return rows.select(train), rows.select(validation)
