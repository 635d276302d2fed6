"""The data that a run asks for, from wherever it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from rose_ds.data import TaskData, load_task
from rose_ds.data.errors import DataError
from rose_ds.data.files import Files, load_files, with_adversarial
from rose_ds.data.loading import SPLITS
from rose_ds.data.tasks import find_task
from rose_ds.experiments.metrics import FILE, Metrics
from rose_ds.experiments.settings import RunSettings


def load_data(run: RunSettings, splits: Sequence[str] = SPLITS, labels: Sequence[str] | None = None) -> TaskData:
    """The task's splits, thinned out where a run asks for fewer rows; files may be sorted by label.

    Args:
        labels: of a trained model, which its own files must have.

    Raises:
        DataError: see ``load_task`` and ``load_files``.
    """
    files = Files(
        _path(run.train_file),
        _path(run.validation_file),
        run.dataset,
        _path(run.adversarial_file),
        None if run.text_columns is None else tuple(run.text_columns),
        run.label_column,
        run.file_encoding,
        run.drop_unlabelled,
    )
    if run.own_files:
        if run.data is not None and find_task(run.task_name or "") is not None:
            raise DataError(
                f"--data {run.data} and files of your own are both said to hold {run.task_name}: leave --data out and "
                "name its dev set with --validation_file and its adversarial one with --adversarial_file"
            )
        data = load_files(files, run.task_name, labels, splits)
    else:
        wanted = [s for s in splits if s != "adversarial" or run.adversarial_file is None]
        data = load_task(run.task, run.data, splits=wanted)
        if "adversarial" in splits and run.adversarial_file is not None:
            data = with_adversarial(data, files)
    return replace(
        data,
        train=thinned(data.train, run.max_train_samples),
        validation=thinned(data.validation, run.max_eval_samples),
        adversarial=thinned(data.adversarial, run.max_eval_samples),
    )


#: Fields of RunSettings that name rows of one's own.
_FILES = ("train_file", "validation_file", "dataset")
#: Fields of RunSettings that name what is read: one of them given, nothing of _SOURCE is taken over from a run.
_NAMED = ("task", *_FILES)
#: Fields that say which rows are read, and how.
_SOURCE = (
    "task",
    "data",
    "train_file",
    "validation_file",
    "adversarial_file",
    "dataset",
    "text_columns",
    "label_column",
    "drop_unlabelled",
    "file_encoding",
)
#: Fields that thin a run's own rows out.
_THINNING = ("max_train_samples", "max_eval_samples")
#: Fields that are no business of whoever looks at a finished run.
_OF_TRAINING = ("model", "engine", "record_masks", "disagreement_steps")


def settings_of(folder: str, given: Mapping[str, Any]) -> RunSettings:
    """What a run was trained on, as its metrics.json has it; ``given`` flags come first. A task, a data set or a file
    takes the place of all that the run says about its rows, how many included; another folder of the data, an
    adversarial file or a column does not.

    Raises:
        ValueError: metrics.json cannot be read; or there is none, and nothing given says what to look at.
    """
    names, known = {f.name for f in fields(RunSettings)}, dict[str, Any]()
    if (Path(folder) / FILE).is_file():
        config = Metrics.read(Path(folder)).config
        own = set(given) & set(_NAMED)
        wanted = names - set(_OF_TRAINING) - set((*_SOURCE, *_THINNING) if own else ())
        if any(config.get(name) is not None for name in _FILES):
            wanted -= {"data"}  # which a run of files does not read
        known = {name: value for name, value in config.items() if name in wanted}
    elif not set(given) & set(_NAMED):
        raise ValueError(
            f"{folder} has no {FILE} that says what it was trained on: give --task, or the rows with --validation_file "
            "or --dataset"
        )
    return RunSettings(**{**known, **{k: v for k, v in given.items() if k in names}, "model": folder})


_SKEW = 5.0
"""Standard deviations of a share of labels among rows drawn at random."""
_COMMON = 10
"""Rows of a label, and others, from which on they say something."""


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def thinned(dataset: Any, count: int | None) -> Any:
    """So many rows, evenly spaced, in their order; all where there are no more.

    Raises:
        DataError: that gives other labels than the whole has.
    """
    if dataset is None or count is None or count >= len(dataset):
        return dataset
    rows = [i * len(dataset) // count for i in range(count)]
    labels = np.asarray(dataset["label"][:])
    whole, part = (np.bincount(some, minlength=labels.max() + 1) / len(some) for some in (labels, labels[rows]))
    common = count * np.minimum(whole, 1 - whole) >= _COMMON
    if (abs(part - whole) > _SKEW * np.sqrt(whole * (1 - whole) / count))[common].any():
        raise DataError(
            f"{count} of {len(dataset)} rows, evenly spaced, have labels in other shares ({_shares(part)}) than all of "
            f"them ({_shares(whole)}): their order has a period that the spacing meets; take another number of rows, "
            "such as a few more, or shuffle the file"
        )
    return dataset.select(rows)


def _shares(values: Any) -> str:
    return ", ".join(f"{value:.0%}" for value in values)
