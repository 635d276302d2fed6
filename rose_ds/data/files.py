"""A classification task of one's own files: which columns are texts, what the labels are, and a dev set."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from rose_ds.data.errors import DataError
from rose_ds.data.glue_folder import UNTEXT, read_adversarial, task_features
from rose_ds.data.held_out import set_aside
from rose_ds.data.hub import load_named
from rose_ds.data.labels import class_ids, classes_in, labelled
from rose_ds.data.loading import SPLITS, TaskData
from rose_ds.data.tables import Rows, read_rows, rows_of
from rose_ds.data.tasks import TaskSpec, find_task

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
    drop_unlabelled: bool = False
    """Rows with no label, or the label -1, are left out, in all of these sets but AdvGLUE's."""


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
            _kept(rows_of(splits_of[name], Path(f"{files.dataset}[{name}]"), files.label_column), files)
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
        known = classes_in(first, files.label_column) if labels is None else tuple(labels)
        spec = TaskSpec(task or named.stem, OWN_TEXTS[: len(columns)], known)
    ids = glue is not None or labels is not None
    found: dict[str, Dataset | None] = {}
    for name, rows in (("train", train), ("validation", validation), ("adversarial", adversarial)):
        found[name] = None if rows is None else _dataset(rows, columns, files.label_column, spec, ids=ids)
    if json_sets and files.adversarial is not None:
        found["adversarial"] = read_adversarial(spec, files.adversarial)
    if found["validation"] is None and found["train"] is not None:
        found["train"], found["validation"] = set_aside(found["train"], spec, first.path, columns)
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
    return None if path is None else _kept(read_rows(path, files.encoding, files.label_column), files)


def _kept(rows: Rows, files: Files) -> Rows:
    return labelled(rows, files.label_column) if files.drop_unlabelled else rows


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


def _dataset(rows: Rows, texts: Sequence[str], label_column: str, spec: TaskSpec, *, ids: bool) -> Dataset:
    """``ids``: the file may have the labels' ids in place of their names."""
    columns: dict[str, list[Any]] = {name: [] for name in spec.fields}
    columns["label"] = class_ids(rows, label_column, spec.labels, ids=ids)
    columns["idx"] = list(range(len(rows.rows)))
    at = [rows.column(name) for name in texts]
    for number, cells in rows.rows:
        for field, column, position in zip(spec.fields, texts, at, strict=True):
            text = cells[position]
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"{rows.where(number)}: expected a text in {column!r}, found {text!r:.80}")
            if UNTEXT.search(text):
                raise DataError(f"{rows.where(number)}: {column!r} has a NUL or half a surrogate pair: {text!r:.80}")
            columns[field].append(text)
    return Dataset.from_dict(columns, features=task_features(spec))
