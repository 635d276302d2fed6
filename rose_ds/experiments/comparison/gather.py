"""From a store's lines to runs by task and method, with settings chosen by the clean dev set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rose_ds.experiments.cells import Cell
from rose_ds.experiments.comparison.choice import (
    ACCURACY,
    RECORDED,
    Candidate,
    Entry,
    Run,
    candidates_of,
    commonest_data,
    entry_of,
)
from rose_ds.experiments.comparison.statistics import Difference, compare
from rose_ds.experiments.metrics import ADVERSARIAL, Metrics
from rose_ds.experiments.presets import PRESETS
from rose_ds.experiments.settings import RunSettings
from rose_ds.experiments.store import Status, Store

#: From this share of one answer on, a run counts as collapsed.
ONE_ANSWER = 0.98


@dataclass(frozen=True)
class Comparison:
    """All that stores hold."""

    stores: Mapping[str, Store]
    """Where each finished cell's answers are."""
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    entries: Mapping[tuple[str, str], Entry]
    """(task, method) -> entry, where at least one run is finished, on the data that most of the task's runs are on."""
    apart: Sequence[Candidate]
    """Those that were measured on, or trained from, other data than their task's others."""
    unfinished: Sequence[tuple[str, Status, str]]
    """Name, status, and a failed one's last line."""
    baseline: str | None
    _read: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Answers by run and set, as arrays, once they were read: without the logits."""

    @property
    def hostile(self) -> str:
        """What the adversarial sets are: AdvGLUE, unless a run had another one."""
        names = {
            run.metrics.adversarial_name for _, run in self.every_run() if run.metrics.advglue_accuracy is not None
        }
        return names.pop() if len(names) == 1 else ADVERSARIAL

    def sets(self) -> list[str]:
        """Those that some run was measured on, by their names in ACCURACY."""
        return [name for name, value in ACCURACY.items() if any(value(run) is not None for _, run in self.every_run())]

    def shown(self, name: str) -> str:
        """A set's name for a person."""
        return self.hostile if name == "AdvGLUE" else name

    def difference(self, task: str, method: str, name: str) -> Difference | None:
        """A method against the baseline on a set, or under an attack, over the seeds that both have; None where there
        is nothing to pair.

        Raises:
            ValueError: the two were measured on other items.
        """
        ours, base = self.entries.get((task, method)), self.entries.get((task, self.baseline or ""))
        if ours is None or base is None or method == self.baseline:
            return None
        pairs = [(run, other) for run in ours.runs for other in base.runs if run.seed == other.seed]
        measured = [run for pair in pairs for run in pair]
        records = [record for run in measured if (record := self._answers(run, name)) is not None]
        if not records or len(records) < len(measured):
            return None
        for run, record in zip(measured, records, strict=True):
            if not all(np.array_equal(record[what], records[0][what]) for what in ("idx", "label")):
                raise ValueError(
                    f"{task}: run {run.key} ({run.method}, seed {run.seed}) was measured on other "
                    f"{self.shown(name)} items than "
                    f"run {measured[0].key}: compare runs with the same data and --max_eval_samples"
                )
        hits = [record["right"] for record in records]
        return compare(np.stack(hits[::2]), np.stack(hits[1::2]))

    def every_run(self) -> Iterator[tuple[Candidate, Run]]:
        """All finished runs, also of settings that were not chosen."""
        for candidate in [*(one for entry in self.entries.values() for one in entry.candidates), *self.apart]:
            yield from ((candidate, run) for run in candidate.runs)

    def commonest_answer(self, run: Run) -> float | None:
        """The share of the clean items that get a run's most frequent answer; None where they have but one label."""
        record = self._answers(run, "clean")
        if record is None or len(set(record["label"])) < 2:
            return None
        return float(np.unique(record["prediction"], return_counts=True)[1].max() / len(record["label"]))

    def has_collapsed(self, run: Run) -> bool:
        """Whether it gives nearly all clean items one answer, and knows next to none of the others: where nearly all
        items have one label, to give it to them is right.
        """
        record = self._answers(run, "clean")
        if record is None or (self.commonest_answer(run) or 0.0) < ONE_ANSWER:
            return False
        commonest = np.unique(record["label"], return_counts=True)[1].max() / len(record["label"])
        return float(np.mean(record["right"]) - commonest) < 0.1 * (1 - commonest)

    def _answers(self, run: Run, name: str) -> Mapping[str, Any] | None:
        if run.key not in self._read:
            self._read[run.key] = {}
            for part, record in self.stores[run.key].predictions(run.key).items():
                right = record.get("right")  # of an attack; of a set, the answers themselves
                if right is None:
                    right = np.equal(record["prediction"], record["label"])
                kept = {name: np.asarray(value) for name, value in record.items() if name not in ("set", "logits")}
                self._read[run.key][part] = {**kept, "right": np.asarray(right)}
        return self._read[run.key].get(RECORDED.get(name, name))


def models_in(stores: Sequence[Store]) -> list[str]:
    """The models that the stores' cells start from."""
    settings = [cell.settings for store in stores for cell in store.plan()]
    settings += [line["settings"] for store in stores for line in store.results().values()]
    return list(dict.fromkeys(map(_model, settings)))


def gather(stores: Sequence[Store], baseline: str | None = None, model: str | None = None) -> Comparison:
    """Read stores as if they were one.

    Args:
        baseline: the method that others are compared with; None: vanilla, where it is among them.
        model: whose cells; two models are no two settings of one method to choose among. None: of a store of one.

    Raises:
        ValueError: a store holds no cells, is damaged, or they have no such method.
    """
    planned_in: dict[str, tuple[Cell, Store]] = {}
    finished_in: dict[str, tuple[Mapping[str, Any], Store]] = {}
    for store in stores:
        if not store.plan() and not store.results():
            raise ValueError(f"{store.root} holds no cells: rose-ds sweep --store {store.root} makes them")
        for cell in store.plan():
            planned_in.setdefault(cell.key, (cell, store))
        for key, line in store.results().items():
            finished_in.setdefault(key, (line, store))
    plan = [cell for cell, _ in planned_in.values()]
    results = {key: line for key, (line, _) in finished_in.items()}
    runs = [_run(line) for line in results.values()]
    everywhere = {cell.method for cell in plan} | {run.method for run in runs}
    if baseline is not None and baseline not in everywhere:
        raise ValueError(f"baseline={baseline!r} is not one of the store's methods {sorted(everywhere)}")
    if model is not None:
        plan = [cell for cell in plan if _model(cell.settings) == model]
        runs = [run for run in runs if _model(run.settings) == model]
    tasks = tuple(dict.fromkeys([cell.task for cell in plan] + [run.task for run in runs]))
    methods = tuple(dict.fromkeys([cell.method for cell in plan] + [run.method for run in runs]))
    given_up = {key for store in stores for key in store.given_up()} - results.keys()
    wanted, entries, apart = baseline or "vanilla", dict[tuple[str, str], Entry](), list[Candidate]()
    for task in tasks:
        planned = {method: [cell for cell in plan if (cell.task, cell.method) == (task, method)] for method in methods}
        found = {
            method: candidates_of([run for run in runs if (run.task, run.method) == (task, method)], cells, given_up)
            for method, cells in planned.items()
        }
        data = commonest_data([candidate for candidates in found.values() for candidate in candidates])
        for method, candidates in found.items():
            apart += [candidate for candidate in candidates if candidate.data != data]
            if alike := [candidate for candidate in candidates if candidate.data == data]:
                entries[task, method] = entry_of(alike, planned[method])
    unfinished = []
    for cell in plan:
        store = planned_in[cell.key][1]
        status = store.status(cell, results)
        if status is not Status.DONE:
            said = store.failure(cell)["log"][-1:] if status is Status.FAILED else []
            unfinished.append((cell.name, status, "".join(said)))
    return Comparison(
        {key: store for key, (_, store) in finished_in.items()},
        tuple(dict.fromkeys(run.metrics.model for run in runs)),
        tasks,
        methods,
        entries,
        apart,
        unfinished,
        wanted if wanted in methods else None,
    )


def _model(settings: Mapping[str, Any]) -> str:
    return str(settings.get("model") or PRESETS.get(settings.get("preset", ""), RunSettings.model))


def _run(line: Mapping[str, Any]) -> Run:
    metrics = Metrics(**line["metrics"])
    trajectory = line.get("trajectory", [])
    where = line["task"], line["method"], line["seed"], line["settings"], line["varied"]
    return Run(line["cell"], *where, metrics, trajectory)


@dataclass(frozen=True)
class Matched:
    """A run's checkpoint whose clean accuracy is nearest to a level."""

    point: Mapping[str, Any]
    run: Run


def matched(comparison: Comparison, task: str) -> tuple[float, dict[str, list[Matched]]] | None:
    """Checkpoints of all methods at one clean accuracy, so that robustness is not traded for it unseen.

    The level is the lowest, over methods, of the mean best clean accuracy along training: one that every method gets
    to; methods of which a run has collapsed do not count. Each run gives the checkpoint nearest to it, the earliest of
    equals. None where no run was evaluated on its way.
    """
    along: dict[str, list[Run]] = {}
    for method in comparison.methods:
        entry = comparison.entries.get((task, method))
        runs = [run for run in entry.runs if any("clean" in p for p in run.trajectory)] if entry else []
        if runs:
            along[method] = runs
    if not along:
        return None
    sound = [runs for runs in along.values() if not any(map(comparison.has_collapsed, runs))] or list(along.values())
    level = min(float(np.mean([max(p["clean"] for p in run.trajectory) for run in runs])) for runs in sound)
    return level, {
        method: [Matched(min(run.trajectory, key=lambda p: abs(p["clean"] - level)), run) for run in runs]
        for method, runs in along.items()
    }
