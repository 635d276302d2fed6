"""load_task: one task's splits, from the hub, from a folder, or embedded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from rose_ds.data.errors import DataError
from rose_ds.data.glue_folder import load_folder
from rose_ds.data.hub import load_hub
from rose_ds.data.snippets import load_snippets
from rose_ds.data.tasks import TaskSpec, get_task

SPLITS = ("train", "validation", "adversarial")


@dataclass(frozen=True)
class TaskData:
    """The splits of one task that were asked for; each has the columns `spec.fields`, `label` and `idx`."""

    spec: TaskSpec
    train: Dataset | None = None
    """GLUE's training set; None when not asked for."""
    validation: Dataset | None = None
    """GLUE's dev set, which has public labels; None when not asked for."""
    adversarial: Dataset | None = None
    """AdvGLUE's dev set; None when not asked for, or where the source has none."""


def load_task(task: str, data: str | os.PathLike[str] | None = None, *, splits: Sequence[str] = SPLITS) -> TaskData:
    """Load a task, reading only the splits asked for.

    Args:
        task: a name in TASKS, or an alias such as "SST-2".
        data: a folder in GLUE's own TSV layout; for `snippets`, a folder that holds the source archive.
            None: the hub, kept in `datasets`' own cache (HF_DATASETS_CACHE); for `snippets`, its cache
            (ROSE_DS_CACHE) or else pip.
        splits: any of "train", "validation", "adversarial".

    Raises:
        DataError: unknown task or split; data missing, corrupt or unreachable. Names the file and line.
    """
    spec = get_task(task)
    unknown = [split for split in splits if split not in SPLITS]
    if unknown:
        raise DataError(f"unknown split {', '.join(map(repr, unknown))}; choose from: {', '.join(SPLITS)}")
    root = None if data is None else Path(data)
    if spec.folder is None:
        return TaskData(spec, **load_snippets(spec, splits, root))
    if root is None:
        return TaskData(spec, **load_hub(spec, splits))
    return TaskData(spec, **load_folder(spec, splits, root))
