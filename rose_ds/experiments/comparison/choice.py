"""The settings that a method tried on a task, and which of them is taken: by the clean dev set alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rose_ds.experiments.cell_key import settings_key
from rose_ds.experiments.cells import Cell
from rose_ds.experiments.metrics import Metrics
from rose_ds.experiments.settings import RunSettings


@dataclass(frozen=True)
class Run:
    """A finished cell."""

    key: str
    task: str
    method: str
    seed: int
    settings: Mapping[str, Any]
    varied: Mapping[str, Any]
    """Those that a grid varied."""
    metrics: Metrics
    trajectory: Sequence[Mapping[str, Any]]


#: Set -> its accuracy in a run.
ACCURACY: dict[str, Callable[[Run], float | None]] = {
    "clean": lambda run: run.metrics.glue_accuracy,
    "AdvGLUE": lambda run: run.metrics.advglue_accuracy,
    "perturbed": lambda run: run.metrics.perturbed_accuracy,
}
#: Settings of what a run is measured on, not of how it is trained.
_OF_MEASURING = ("validation_file", "adversarial_file", "dataset", "max_eval_samples", "perturb_seed")
#: And of how own files are read.
_OF_READING = ("text_columns", "label_column", "file_encoding", "drop_unlabelled")
#: And its calibration error.
CALIBRATION: dict[str, Callable[[Run], float | None]] = {
    "clean": lambda run: run.metrics.glue_ece,
    "AdvGLUE": lambda run: run.metrics.advglue_ece,
    "perturbed": lambda run: run.metrics.perturbed_ece,
}
#: The same sets in a run's answers and along its training.
RECORDED = {"clean": "clean", "AdvGLUE": "adversarial", "perturbed": "perturbed"}


@dataclass(frozen=True)
class Candidate:
    """One setting that a method tried on a task, over its finished seeds."""

    varied: Mapping[str, Any]
    """What sets it apart: settings that a grid varied, or in which the method's candidates on the task differ."""
    runs: tuple[Run, ...]
    planned: int
    """Seeds that it should have."""
    given_up: bool = False
    """Under some seed, as it fell behind."""

    def mean(self, name: str) -> float | None:
        """Accuracy on a set, over seeds; None where a run has none."""
        found = [ACCURACY[name](run) for run in self.runs]
        values = [value for value in found if value is not None]
        return float(np.mean(values)) if values and len(values) == len(found) else None

    @property
    def data(self) -> str:
        """See ``data_of``."""
        return data_of(self.runs[0].settings)

    @property
    def label(self) -> str:
        """The setting, for a person."""
        return ", ".join(f"{name}={value}" for name, value in self.varied.items()) or "defaults"


@dataclass(frozen=True)
class Entry:
    """A method on a task."""

    candidates: tuple[Candidate, ...]
    chosen: Candidate
    """Of highest mean accuracy on the clean dev set; the first of equals. Only settings with the most finished seeds
    can be chosen, so that none wins by the luck of the few it has; and none that was given up, where one was not.
    """
    oracle: Candidate | None
    """The same by AdvGLUE, which no user could know: the largest it could be, shown apart."""
    tried: int
    """Settings, also those of which no run was finished, or all were given up."""

    @property
    def runs(self) -> tuple[Run, ...]:
        """Of the chosen setting."""
        return self.chosen.runs


def candidates_of(runs: Sequence[Run], planned: Sequence[Cell], given_up: Collection[str]) -> list[Candidate]:
    """By all of their settings: a sweep may have been asked for more, or for something else, later."""
    settings: dict[str, Mapping[str, Any]] = {settings_key(cell.portable): cell.portable for cell in planned}
    settings |= {settings_key(run.settings): run.settings for run in runs}
    by_grid = [cell.varied for cell in planned] + [run.varied for run in runs]
    names = list(dict.fromkeys(name for varied in by_grid for name in varied))
    for name in sorted({name for one in settings.values() for name in one} - set(names)):
        if len({settings_key({name: one.get(name)}) for one in settings.values()}) > 1:
            names.append(name)
    wanted = Counter(settings_key(cell.portable) for cell in planned)
    behind = {settings_key(cell.portable) for cell in planned if cell.key in given_up}
    found = []
    for key, one in settings.items():
        group = sorted((run for run in runs if settings_key(run.settings) == key), key=lambda run: run.seed)
        if group:
            varied = {name: one.get(name, "default") for name in names}
            found.append(Candidate(varied, tuple(group), wanted[key] or len(group), key in behind))
    return found


def data_of(settings: Mapping[str, Any]) -> str:
    """A text that is the same for settings under which accuracies may stand beside each other."""
    names = [*_OF_MEASURING, *_OF_READING]
    if "validation_file" not in settings:  # a part of it is the dev set
        names.append("train_file")
    return settings_key({name: settings.get(name, getattr(RunSettings, name, None)) for name in names})


def commonest_data(candidates: Sequence[Candidate]) -> str | None:
    """That of most runs, the first of equals; None where there are none."""
    count: Counter[str] = Counter()
    for candidate in candidates:
        count[candidate.data] += len(candidate.runs)
    return count.most_common(1)[0][0] if count else None


def entry_of(candidates: Sequence[Candidate], planned: Sequence[Cell]) -> Entry:
    """With the choice made. All candidates are of the same data."""
    data = candidates[0].data
    tried = {settings_key(cell.portable) for cell in planned if data_of(cell.portable) == data}
    tried |= {settings_key(run.settings) for candidate in candidates for run in candidate.runs}
    alike = [c for c in candidates if not c.given_up] or candidates
    most = max(len(c.runs) for c in alike)
    eligible = [c for c in alike if len(c.runs) == most]
    by_adversary = [c for c in eligible if c.mean("AdvGLUE") is not None]
    return Entry(
        tuple(candidates),
        max(eligible, key=lambda c: c.mean("clean") or 0.0),
        max(by_adversary, key=lambda c: c.mean("AdvGLUE") or 0.0) if by_adversary else None,
        len(tried),
    )
