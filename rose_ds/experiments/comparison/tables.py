"""The tables of a comparison, as rows of text; ``render`` puts them into files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rose_ds.experiments.comparison.gather import (
    ACCURACY,
    ONE_ANSWER,
    RECORDED,
    Candidate,
    Comparison,
    Entry,
    matched,
)
from rose_ds.experiments.comparison.statistics import mean_sd

#: ROSE's Table 1, by model and method: means over its four tasks of GLUE and AdvGLUE accuracy, in percent.
PAPER = {("roberta-base", "vanilla"): (89.19, 24.78)}
_PAPERS = {"qnli", "qqp", "rte", "sst2"}


@dataclass(frozen=True)
class Table:
    """One table."""

    key: str
    """Its file's name."""
    title: str
    note: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def tables(comparison: Comparison) -> list[Table]:
    """Those that the store has something for."""
    made = [
        accuracy(comparison),
        attacked(comparison),
        under_attack(comparison),
        significance(comparison),
        collapsed(comparison),
        matched_accuracy(comparison),
        choices(comparison),
        oracle(comparison),
        every_setting(comparison),
        every_seed(comparison),
        unfinished(comparison),
    ]
    return [table for table in made if table.rows]


def percent(values: Sequence[float | None], scale: float = 100.0, digits: int = 2) -> str:
    """Mean and standard deviation; "-" where there is nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean, sd = mean_sd([scale * value for value in known])
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def _of(entry: Entry | None, name: str) -> list[float | None]:
    return [] if entry is None else [ACCURACY[name](run) for run in entry.runs]


def _seeds(entry: Entry) -> str:
    chosen = entry.chosen
    return str(len(chosen.runs)) if len(chosen.runs) >= chosen.planned else f"{len(chosen.runs)} of {chosen.planned}"


def accuracy(c: Comparison) -> Table:
    """The shape of the paper's Table 1: rows methods, columns tasks."""
    header = ["method", *(f"{t} {s}" for t in c.tasks for s in ("clean", "AdvGLUE")), "Avg", "Delta", "seeds"]
    rows = []
    for method in c.methods:
        entries = [c.entries.get((task, method)) for task in c.tasks]
        cells = [percent(_of(e, s)) for e in entries for s in ("clean", "AdvGLUE")]
        clean = [e.chosen.mean("clean") if e else None for e in entries]
        hostile = [e.chosen.mean("AdvGLUE") if e else None for e in entries]
        known = [value for value in clean + hostile if value is not None]
        whole = len(known) == 2 * len(entries)
        average = f"{100 * np.mean(known):.2f}" if whole else "-"
        delta = f"{100 * (np.mean(known[: len(entries)]) - np.mean(known[len(entries) :])):.2f}" if whole else "-"
        seeds = " ".join(_seeds(e) if e else "0" for e in entries)
        rows.append((method, *cells, average, delta, seeds))
        for model in c.models if set(c.tasks) == _PAPERS else ():
            if (model, method) in PAPER:
                first, second = PAPER[model, method]
                blank = ("-",) * (2 * len(c.tasks))
                rows.append((f"{method} (paper)", *blank, f"{(first + second) / 2:.2f}", f"{first - second:.2f}", "-"))
    note = (
        f"{', '.join(c.models) or 'no finished runs'}. Accuracy in percent, mean and standard deviation over seeds, at "
        "the setting with the highest clean accuracy. Avg: over all clean and AdvGLUE cells of a row; Delta: clean "
        "less AdvGLUE accuracy, both averaged over tasks, in points. A dash: not there for every task."
    )
    return Table("accuracy", "Table 1: accuracy on clean and adversarial text", note, tuple(header), rows)


def attacked(c: Comparison) -> Table:
    """Other kinds of attack, calibration and cost."""
    sets = ("perturbed", "Delta perturbed", "ECE clean", "ECE AdvGLUE")
    header = ("task", "method", *sets, "step (s)", "peak memory (GiB)", "kept (%)")
    rows = []
    for (task, method), entry in c.entries.items():
        metrics = [run.metrics for run in entry.runs]
        clean, hard = entry.chosen.mean("clean"), entry.chosen.mean("perturbed")
        delta = "-" if clean is None or hard is None else f"{100 * (clean - hard):.2f}"
        row = [task, method, percent(_of(entry, "perturbed")), delta]
        row += [percent([m.glue_ece for m in metrics]), percent([m.advglue_ece for m in metrics])]
        row += [percent([m.step_seconds for m in metrics], scale=1, digits=3)]
        row += [percent([m.peak_memory_bytes for m in metrics], scale=2.0**-30)]
        row += [percent([m.kept_fraction for m in metrics], digits=0)]
        rows.append(tuple(row))
    note = (
        "Perturbed: the clean dev set with typos, homoglyphs and distractors. ECE: expected calibration error in "
        "points. Step: median wall-clock seconds; runs side by side on one machine slow each other down."
    )
    return Table("attacked", "Table 2: other attacks, calibration and cost", note, header, rows)


def under_attack(c: Comparison) -> Table:
    """Automatic attacks, each beside its like alone."""
    header = ("task", "attack", "method", "accuracy", "seeds")
    rows = []
    for task in c.tasks:
        entries = {method: c.entries[task, method] for method in c.methods if (task, method) in c.entries}
        made = dict.fromkeys(name for e in entries.values() for run in e.runs for name in run.metrics.under_attack)
        for name in made:
            for method, entry in entries.items():
                found = [v for run in entry.runs if (v := run.metrics.under_attack.get(name)) is not None]
                if found:
                    rows.append((task, name, method, percent(found), str(len(found))))
    note = (
        "A search of its own on each model (rose-ds sweep --attack; the paper has none). Rows compare under one "
        "search, limits and items alone: those are its name, the items by a digest of their texts."
    )
    return Table("under_attack", "Accuracy under attack", note, header, rows)


def significance(c: Comparison) -> Table:
    """Each method against the baseline."""
    header = ("task", "method", "set", "gain (points)", "95% interval", "p bootstrap", "p t-test", "seeds")
    rows = []
    for task in c.tasks:
        for method in c.methods:
            for name in RECORDED:
                found = c.difference(task, method, name)
                if found is not None:
                    t = "-" if found.p_t is None else f"{found.p_t:.4f}"
                    interval = f"{found.low:+.2f} to {found.high:+.2f}"
                    gain, p = f"{found.points:+.2f}", f"{found.p_bootstrap:.4f}"
                    rows.append((task, method, name, gain, interval, p, t, str(found.seeds)))
    note = (
        f"Gain over {c.baseline}, over the seeds that both have. Bootstrap: items and seeds resampled together, "
        "paired; its p and the t-test's (Student, two-sample, over seeds, as the paper's) are one-sided and not "
        "corrected for the number of rows. The t-test sees no error of having few items, and AdvGLUE has 78 to 148."
    )
    return Table("significance", "Table 3: differences from the baseline", note, header, rows)


def collapsed(c: Comparison) -> Table:
    """Runs that have learned nothing, which a mean over seeds hides."""
    header = ("task", "method", "setting", "seed", "one answer (%)", "clean", "AdvGLUE", "perturbed")
    rows = []
    for candidate, run in c.every_run():
        share = c.commonest_answer(run)
        if share is not None and share >= ONE_ANSWER:
            cells = [percent([ACCURACY[name](run)]) for name in RECORDED]
            rows.append((run.task, run.method, candidate.label, str(run.seed), f"{100 * share:.1f}", *cells))
    note = (
        f"They give one answer to {100 * ONE_ANSWER:.0f}% of the clean items or more, and are in the tables above all "
        "the same. AdvGLUE's items are those that fooled trained models: a run that guesses can be right on more of "
        "them than one that has learned, so a gain there that comes from such runs is none."
    )
    return Table("collapsed", "Collapsed runs", note, header, rows)


def matched_accuracy(c: Comparison) -> Table:
    """Robustness at one clean accuracy."""
    header = ("task", "method", "level", "step", "clean", "AdvGLUE", "perturbed")
    rows = []
    for task in c.tasks:
        found = matched(c, task)
        if found is None:
            continue
        level, methods = found
        for method, points in methods.items():
            cells = [percent([m.point.get(name) for m in points]) for name in RECORDED.values()]
            steps = percent([m.point["step"] for m in points], scale=1, digits=0)
            rows.append((task, method, f"{100 * level:.2f}", steps, *cells))
    note = (
        "Each run's checkpoint whose clean accuracy is nearest to a level that every method reaches (the lowest, over "
        "methods none of whose runs collapsed, of the mean best one along training). A method that only trains more "
        "slowly shows no gain here."
    )
    return Table("matched", "At equal clean accuracy", note, header, rows)


def choices(c: Comparison) -> Table:
    """What was chosen, and among how many."""
    header = ("task", "method", "settings tried", "chosen", "clean", "runner-up", "clean of it")
    rows = []
    for (task, method), entry in c.entries.items():
        others = [x for x in entry.candidates if x is not entry.chosen]
        second = max(others, key=lambda x: x.mean("clean") or 0.0, default=None)
        rows.append(
            (
                task,
                method,
                str(len(entry.candidates)),
                entry.chosen.label,
                _mean(entry.chosen, "clean"),
                "-" if second is None else second.label,
                "-" if second is None else _mean(second, "clean"),
            )
        )
    note = (
        "Settings are chosen by the mean accuracy on the clean dev set alone, among those with the most finished seeds."
    )
    counts = {len(entry.candidates) for entry in c.entries.values()}
    if len(counts) > 1:
        note += " The methods did not try equally many: those that tried more had more chances."
    return Table("choices", "Choice of settings", note, header, rows)


def oracle(c: Comparison) -> Table:
    """The choice that nobody could have made."""
    header = ("task", "method", "chosen", "clean", "AdvGLUE", "gain over the honest choice")
    rows = []
    for (task, method), entry in c.entries.items():
        if entry.oracle is None or len(entry.candidates) < 2:
            continue
        best, honest = entry.oracle.mean("AdvGLUE"), entry.chosen.mean("AdvGLUE")
        gain = "-" if best is None or honest is None else f"{100 * (best - honest):+.2f}"
        row = (task, method, entry.oracle.label, _mean(entry.oracle, "clean"), _mean(entry.oracle, "AdvGLUE"), gain)
        rows.append(row)
    note = "Settings chosen by AdvGLUE itself: an upper bound, not a result. No other table uses it."
    return Table("oracle", "Choice by AdvGLUE (oracle)", note, header, rows)


def every_setting(c: Comparison) -> Table:
    """All that was tried."""
    header = ("task", "method", "setting", "clean", "AdvGLUE", "perturbed", "Avg", "seeds")
    rows = []
    for (task, method), entry in c.entries.items():
        for candidate in entry.candidates if len(entry.candidates) > 1 else ():
            cells = [percent([ACCURACY[name](run) for run in candidate.runs]) for name in RECORDED]
            both = [candidate.mean("clean"), candidate.mean("AdvGLUE")]
            average = "-" if None in both else f"{100 * np.mean([b for b in both if b is not None]):.2f}"
            count = f"{len(candidate.runs)} of {candidate.planned}"
            rows.append((task, method, candidate.label, *cells, average, count))
    return Table("settings", "Every setting tried", "Avg: of clean and AdvGLUE accuracy.", header, rows)


def every_seed(c: Comparison) -> Table:
    """No seed is left out."""
    header = ("task", "method", "setting", "seed", "clean", "AdvGLUE", "perturbed", "steps", "cell")
    rows = []
    for candidate, run in c.every_run():
        cells = [percent([value(run)]) for value in ACCURACY.values()]
        rows.append((run.task, run.method, candidate.label, str(run.seed), *cells, str(run.metrics.steps), run.key))
    return Table("seeds", "Every run", "Accuracy in percent.", header, rows)


def unfinished(c: Comparison) -> Table:
    """What is missing, and why."""
    rows = [(name, status.value, said or "-") for name, status, said in c.unfinished]
    note = "Not in the tables above, whose last column says how many seeds they have."
    return Table("unfinished", "Runs that are not finished", note, ("run", "status", "last line of its log"), rows)


def _mean(candidate: Candidate, name: str) -> str:
    value = candidate.mean(name)
    return "-" if value is None else f"{100 * value:.2f}"
