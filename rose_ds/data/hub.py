"""GLUE and AdvGLUE from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable

import datasets

from rose_ds.data.errors import DataError
from rose_ds.data.glue_folder import LAYOUT, task_features
from rose_ds.data.tasks import TaskSpec

GLUE = "nyu-mll/glue"
ADVGLUE = "AI-Secure/adv_glue"


def load_hub(spec: TaskSpec, splits: Iterable[str]) -> dict[str, datasets.Dataset]:
    """Load the splits of one GLUE task from the hub, or from `datasets`' own cache of it.

    Raises:
        DataError: the hub cannot be reached, or serves other columns than GLUE's.
    """
    return {split: _load_split(spec, split) for split in splits}


def load_named(name: str) -> dict[str, datasets.Dataset]:
    """The splits of any data set on the hub, or in a folder that ``datasets`` reads: NAME, or NAME:CONFIG.

    Raises:
        DataError: it cannot be reached, or has no training rows.
    """
    repository, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(repository, config or None)
    except Exception as error:  # as below
        raise DataError(
            f"cannot load the data set {name!r}: {type(error).__name__}: {error}\n"
            "Give NAME or NAME:CONFIG of one on the Hugging Face hub, or files with --train_file"
        ) from error
    if "train" not in loaded:
        raise DataError(f"the data set {name!r} has no split 'train', only {', '.join(loaded)}")
    return dict(loaded)


def _load_split(spec: TaskSpec, split: str) -> datasets.Dataset:
    if split == "adversarial":
        repository, config, hub_split = ADVGLUE, f"adv_{spec.adv_key}", "validation"
    else:
        repository, config, hub_split = GLUE, str(spec.hub_config), split
    try:
        loaded = datasets.load_dataset(repository, config, split=hub_split)
    except Exception as error:  # the hub's client raises half a dozen unrelated types, and they change between versions
        raise DataError(
            f"cannot load {repository} ({config}) from the Hugging Face hub: {type(error).__name__}: {error}\n"
            f"Without the hub, pass --data DIR, a folder with {LAYOUT}; or --task snippets, which needs only pip."
        ) from error

    expected = task_features(spec)
    missing = [name for name in expected if name not in loaded.column_names]
    if missing:
        raise DataError(
            f"{repository} ({config}) on the hub has no column {', '.join(map(repr, missing))}; "
            f"expected {', '.join(expected)}, found: {', '.join(loaded.column_names)}"
        )
    names = getattr(loaded.features["label"], "names", None)
    if names != list(spec.labels):  # other names mean other ids, and every accuracy would be silently wrong
        raise DataError(f"{repository} ({config}) on the hub has the labels {names}, expected {list(spec.labels)}")
    loaded = loaded.select_columns(list(expected))
    return (
        loaded
        if loaded.features == expected
        else loaded.cast(expected, keep_in_memory=True, load_from_cache_file=False)
    )
