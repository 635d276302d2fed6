"""The tables of ROSE's paper that compare accuracies, made of a store's runs; its own figures beside its own models.

Jiang et al., EMNLP 2022. Table 1: methods by tasks; Table 2: R-Drop with each of ROSE's masks; Table 3: ROSE-Ensemble
by gamma.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from rose_ds.config import RoseConfig
from rose_ds.experiments.comparison.choice import ACCURACY, Candidate, entry_of
from rose_ds.experiments.comparison.gather import Comparison
from rose_ds.experiments.comparison.paper import TASKS, table_1, table_2, table_3
from rose_ds.experiments.comparison.table import Table, percent

#: A row's setting by task; a task that it has no finished runs of is not there.
Row = Mapping[str, Candidate]
#: (task, set), in the order of a table's columns.
Columns = Sequence[tuple[str, str]]


def accuracy(c: Comparison) -> Table:
    """Table 1: rows methods, columns tasks."""
    columns, rows = _columns(c, c.tasks), list[tuple[str, ...]]()
    for method in c.methods:
        rows.append(_row(method, _chosen(c, method), columns))
        for model in c.models if c.hostile == "AdvGLUE" and _hard(c) == "AdvGLUE" else ():
            if paper := table_1(model, method):
                theirs = {(t, name): paper[t][name != "clean"] / 100 if t in paper else None for t, name in columns}
                shown = [percent([value]) for value in theirs.values()]
                rows.append((f"{method} (paper)", *shown, *_average_and_delta(theirs), "-"))
    hostile = c.shown(_hard(c))
    note = (
        f"{', '.join(c.models) or 'no finished runs'}. Accuracy in percent, mean and standard deviation over seeds, at "
        f"the setting with the highest clean accuracy. Avg: over all clean and {hostile} cells of a row; Delta: clean "
        f"less {hostile} accuracy, both averaged over tasks, in points. A dash: not there for every task."
    )
    return Table("accuracy", f"Table 1: accuracy on clean and {hostile} text", note, _header(c, columns), rows)


def combined(c: Comparison) -> Table:
    """Table 2: an objective alone, and under each mask that it was combined with."""
    groups = []
    for objective in dict.fromkeys(method.partition("+")[0] for method in c.methods if "+" in method):
        family = [objective, *(method for method in c.methods if method.startswith(f"{objective}+"))]
        groups.append({method: _chosen(c, method) for method in family})
    columns, rows = _side_by_side(c, groups, table_2)
    note = (
        "An objective alone and with a mask, each at the setting with the highest clean accuracy, over the seeds that "
        "all of an objective's rows have; a task that only one of them has is left out."
    )
    return Table("combined", "Table 2: an objective and a mask together", note, _header(c, columns), rows)


def by_gamma(c: Comparison) -> Table:
    """Table 3: ROSE-Ensemble by the weight of its first-order mask."""
    found: dict[float, dict[str, Candidate]] = {}
    for task in c.tasks:
        entry = c.entries.get((task, "rose-ensemble"))
        by_value: dict[float, list[Candidate]] = {}
        for candidate in entry.candidates if entry else ():
            by_value.setdefault(candidate.runs[0].settings.get("gamma", RoseConfig.gamma), []).append(candidate)
        for gamma, candidates in by_value.items():
            found.setdefault(gamma, {})[task] = entry_of(candidates, ()).chosen
    columns, rows = _side_by_side(
        c,
        [{str(gamma): found[gamma] for gamma in sorted(found)}],
        lambda model, gamma: None if (average := table_3(model, float(gamma))) is None else (average, None),
    )
    note = (
        "ROSE-Ensemble by gamma, the weight of its first-order mask (Eq. 5), each value at the setting with the "
        "highest clean accuracy, over the seeds that all have; a task on which one value alone was tried is left out."
    )
    return Table("gamma", "Table 3: ROSE-Ensemble by gamma", note, _header(c, columns, "gamma"), rows)


def _side_by_side(
    c: Comparison,
    groups: Sequence[Mapping[str, Row]],
    paper: Callable[[str, str], tuple[float, float | None] | None],
) -> tuple[Columns, list[tuple[str, ...]]]:
    """Rows that are compared within their group: on the tasks that two of a group have, over the seeds that all have.

    Args:
        paper: Avg and Delta that the paper prints for a model and a row, over all of TASKS.
    """
    finished = [{name: row for name, row in group.items() if row} for group in groups]
    shared = [{task for task in c.tasks if sum(task in row for row in group.values()) > 1} for group in finished]
    columns = _columns(c, [task for task in c.tasks if any(task in tasks for tasks in shared)])
    rows = []
    for group, tasks in zip(finished, shared, strict=True):
        seeds = {t: set.intersection(*(_seeds_of(row[t]) for row in group.values() if t in row)) for t in tasks}
        for name, row in group.items():
            compared = {
                task: replace(row[task], runs=tuple(run for run in row[task].runs if run.seed in seeds[task]))
                for task in tasks & row.keys()
            }
            if not compared:
                continue
            rows.append(_row(name, compared, columns))
            for model in c.models if tasks == set(TASKS) and c.hostile == "AdvGLUE" else ():
                if theirs := paper(model, name):
                    averages = ["-" if value is None else f"{value:.2f}" for value in theirs]
                    rows.append((f"{name} (paper)", *["-"] * len(columns), *averages, "-"))
    return columns, rows


def _seeds_of(candidate: Candidate) -> set[int]:
    return {run.seed for run in candidate.runs}


def _chosen(c: Comparison, method: str) -> Row:
    return {task: c.entries[task, method].chosen for task in c.tasks if (task, method) in c.entries}


def _hard(c: Comparison) -> str:
    """The set that Delta is to: the adversarial one, else the perturbed one."""
    return "AdvGLUE" if "AdvGLUE" in c.sets() else "perturbed"


def _columns(c: Comparison, tasks: Sequence[str]) -> Columns:
    """The clean set of each task, and the hard one where some run was measured on it."""
    hard = _hard(c)
    measured = {run.task for _, run in c.every_run() if ACCURACY[hard](run) is not None}
    return [(task, name) for task in tasks for name in ("clean", hard) if name == "clean" or task in measured]


def _header(c: Comparison, columns: Columns, first: str = "method") -> tuple[str, ...]:
    return (first, *(f"{task} {c.shown(name)}" for task, name in columns), "Avg", "Delta", "seeds")


def _row(name: str, row: Row, columns: Columns) -> tuple[str, ...]:
    cells = [percent([ACCURACY[of](run) for run in row[task].runs] if task in row else []) for task, of in columns]
    means = {(task, of): row[task].mean(of) if task in row else None for task, of in columns}
    seeds = " ".join(_count(row[task]) if task in row else "0" for task in dict.fromkeys(t for t, _ in columns))
    return (name, *cells, *_average_and_delta(means), seeds)


def _count(candidate: Candidate) -> str:
    """How many seeds, and of how many where some are missing."""
    there = len(candidate.runs)
    return str(there) if there >= candidate.planned else f"{there} of {candidate.planned}"


def _average_and_delta(means: Mapping[tuple[str, str], float | None]) -> tuple[str, str]:
    """Of fractions by task and set; dashes where a task lacks one."""
    clean = [mean for (_, name), mean in means.items() if name == "clean" and mean is not None]
    hard = [mean for (_, name), mean in means.items() if name != "clean" and mean is not None]
    if len(clean) != len(hard) or len(clean) + len(hard) < len(means):
        return "-", "-"
    return f"{100 * np.mean(clean + hard):.2f}", f"{100 * (np.mean(clean) - np.mean(hard)):.2f}"
