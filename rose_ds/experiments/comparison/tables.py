"""The tables of a comparison, as rows of text; ``render`` puts them into files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rose_ds.experiments.comparison.choice import ACCURACY, CALIBRATION, RECORDED, Candidate, Run
from rose_ds.experiments.comparison.gather import ONE_ANSWER, Comparison, matched
from rose_ds.experiments.comparison.published import accuracy, by_gamma, combined
from rose_ds.experiments.comparison.table import Table, percent


def tables(comparison: Comparison) -> list[Table]:
    """All; of those that the store has nothing for, there are no rows."""
    return [
        accuracy(comparison),
        combined(comparison),
        by_gamma(comparison),
        attacked(comparison),
        under_attack(comparison),
        significance(comparison),
        collapsed(comparison),
        matched_accuracy(comparison),
        choices(comparison),
        oracle(comparison),
        every_setting(comparison),
        other_data(comparison),
        every_seed(comparison),
        unfinished(comparison),
    ]


def attacked(c: Comparison) -> Table:
    """Other kinds of attack, calibration and cost."""
    sets = c.sets()
    header = ("task", "method", "perturbed", "Delta perturbed", *(f"ECE {c.shown(name)}" for name in sets))
    header += ("step (s)", "peak memory (GiB)", "kept (%)")
    rows = []
    for (task, method), entry in c.entries.items():
        metrics = [run.metrics for run in entry.runs]
        clean, hard = entry.chosen.mean("clean"), entry.chosen.mean("perturbed")
        delta = "-" if clean is None or hard is None else f"{100 * (clean - hard):.2f}"
        row = [task, method, percent([m.perturbed_accuracy for m in metrics]), delta]
        row += [percent([CALIBRATION[name](run) for run in entry.runs]) for name in sets]
        row += [percent([m.step_seconds for m in metrics], scale=1, digits=3)]
        row += [percent([m.peak_memory_bytes for m in metrics], scale=2.0**-30)]
        row += [percent([m.kept_fraction for m in metrics], digits=0)]
        rows.append(tuple(row))
    note = (
        "Perturbed: the clean dev set with typos, homoglyphs and distractors. ECE: expected calibration error in "
        "points. Step: median wall-clock seconds; runs side by side on one machine slow each other down."
    )
    return Table("attacked", "Other attacks, calibration and cost", note, header, rows)


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
        "A search of its own on each model (rose-ds sweep --attack; the paper makes no automatic attacks). Rows "
        "compare under one search, limits and items alone: those are its name, the items by a digest of their texts."
    )
    return Table("under_attack", "Accuracy under attack", note, header, rows)


def significance(c: Comparison) -> Table:
    """Each method against the baseline."""
    header = ("task", "method", "set", "gain (points)", "95% interval", "p bootstrap", "p t-test", "seeds")
    rows, other_items = [], list[str]()
    made = dict.fromkeys(name for _, run in c.every_run() for name in run.metrics.under_attack)
    for task in c.tasks:
        for method in c.methods:
            for name in (*RECORDED, *made):
                try:
                    found = c.difference(task, method, name)
                except ValueError as error:
                    other_items.append(str(error))
                    continue
                if found is not None:
                    t = "-" if found.p_t is None else f"{found.p_t:.4f}"
                    interval = f"{found.low:+.2f} to {found.high:+.2f}"
                    gain, p = f"{found.points:+.2f}", f"{found.p_bootstrap:.4f}"
                    rows.append((task, method, c.shown(name), gain, interval, p, t, str(found.seeds)))
    note = (
        f"Gain over {c.baseline}, over the seeds that both have. Bootstrap: items and seeds resampled together, "
        "paired; its p and the t-test's (Student, two-sample, over seeds, as the paper's) are one-sided and not "
        "corrected for the number of rows. With several seeds the bootstrap's is never below 2^-seeds (all come out "
        "better so often by chance); with one it knows of items alone. The t-test sees no error of having few items, "
        "and AdvGLUE has 78 to 148."
    )
    if other_items:
        note += f" Left out: {'; '.join(other_items)}."
    return Table("significance", "Differences from the baseline", note, header, rows)


def collapsed(c: Comparison) -> Table:
    """Runs that have learned nothing, which a mean over seeds hides."""
    header = ("task", "method", "setting", "seed", "one answer (%)", *map(c.shown, RECORDED))
    rows = []
    for candidate, run in c.every_run():
        if c.has_collapsed(run) and (share := c.commonest_answer(run)) is not None:
            cells = [percent([ACCURACY[name](run)]) for name in RECORDED]
            rows.append((run.task, run.method, candidate.label, str(run.seed), f"{100 * share:.1f}", *cells))
    note = (
        f"They give one answer to {100 * ONE_ANSWER:.0f}% of the clean items or more, and are hardly better than the "
        "commonest label given to all; they are in the tables above all the same. AdvGLUE's items are those that "
        "fooled trained models: a run that guesses can be right on more of them than one that has learned, so a gain "
        "there that comes from such runs is none."
    )
    return Table("collapsed", "Collapsed runs", note, header, rows)


def matched_accuracy(c: Comparison) -> Table:
    """Robustness at one clean accuracy."""
    header = ("task", "method", "level", "step", *_with_ece(c))
    rows = []
    for task in c.tasks:
        found = matched(c, task)
        if found is None:
            continue
        level, methods = found
        for method, points in methods.items():
            values = [v for name in c.sets() for v in (RECORDED[name], f"{RECORDED[name]}_ece")]
            cells = [percent([m.point.get(value) for m in points]) for value in values]
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
                str(entry.tried),
                entry.chosen.label,
                _mean(entry.chosen, "clean"),
                "-" if second is None else second.label,
                "-" if second is None else _mean(second, "clean"),
            )
        )
    note = (
        "Settings are chosen by the mean accuracy on the clean dev set alone, among those with the most finished seeds "
        "that were not given up."
    )
    if any(entry.chosen.given_up for entry in c.entries.values()):
        note += (
            " Of some methods all settings were given up under some seed (rose-ds sweep --halving): the chosen one's "
            "mean is over the seeds under which it did well, and flatters it."
        )
    counts = {entry.tried for entry in c.entries.values()}
    if len(counts) > 1:
        note += " The methods did not try equally many: those that tried more had more chances."
    return Table("choices", "Choice of settings", note, header, rows)


def oracle(c: Comparison) -> Table:
    """The choice that nobody could have made."""
    header = ("task", "method", "chosen", "clean", c.hostile, "gain over the honest choice")
    rows = []
    for (task, method), entry in c.entries.items():
        if entry.oracle is None or len(entry.candidates) < 2:
            continue
        best, honest = entry.oracle.mean("AdvGLUE"), entry.chosen.mean("AdvGLUE")
        gain = "-" if best is None or honest is None else f"{100 * (best - honest):+.2f}"
        row = (task, method, entry.oracle.label, _mean(entry.oracle, "clean"), _mean(entry.oracle, "AdvGLUE"), gain)
        rows.append(row)
    note = f"Settings chosen by the {c.hostile} set itself: an upper bound, not a result. No other table uses it."
    return Table("oracle", f"Choice by the {c.hostile} set (oracle)", note, header, rows)


def every_setting(c: Comparison) -> Table:
    """All that was tried."""
    header = ("task", "method", "setting", *_with_ece(c), "Avg", "seeds")
    rows = []
    for (task, method), entry in c.entries.items():
        for candidate in entry.candidates if len(entry.candidates) > 1 else ():
            cells = _accuracy_and_ece(c, candidate.runs)
            both = [candidate.mean("clean"), candidate.mean("AdvGLUE")]
            average = "-" if None in both else f"{100 * np.mean([b for b in both if b is not None]):.2f}"
            count = f"{len(candidate.runs)} of {candidate.planned}"
            rows.append((task, method, candidate.label, *cells, average, count))
    return Table("settings", "Every setting tried", f"Avg: of clean and {c.hostile} accuracy.", header, rows)


def other_data(c: Comparison) -> Table:
    """What cannot stand beside the rest."""
    header = ("task", "method", "setting", *_with_ece(c), "seeds")
    rows = [
        (candidate.runs[0].task, candidate.runs[0].method, candidate.label, *_accuracy_and_ece(c, candidate.runs))
        + (str(len(candidate.runs)),)
        for candidate in c.apart
    ]
    note = (
        "Of other rows than most of their task's runs (another file, columns, or number of rows), so that no table but "
        "this one and that of every run has them."
    )
    return Table("other_data", "Runs on other data", note, header, rows)


def every_seed(c: Comparison) -> Table:
    """No seed is left out."""
    attacks = any(run.metrics.under_attack for _, run in c.every_run())
    header = ("task", "method", "setting", "seed", *_with_ece(c), *(["under attack"] if attacks else []))
    header += ("steps", "cell")
    rows = []
    for candidate, run in c.every_run():
        cells = _accuracy_and_ece(c, [run])
        if attacks:
            cells.append("; ".join(f"{percent([v])} ({name})" for name, v in run.metrics.under_attack.items()) or "-")
        rows.append((run.task, run.method, candidate.label, str(run.seed), *cells, str(run.metrics.steps), run.key))
    note = "Accuracy in percent, and the calibration error (ECE) beside it in points."
    return Table("seeds", "Every run", note, header, rows)


def _with_ece(c: Comparison) -> list[str]:
    """Headers of ``_accuracy_and_ece``."""
    return [column for name in c.sets() for column in (c.shown(name), f"ECE {c.shown(name)}")]


def _accuracy_and_ece(c: Comparison, runs: Sequence[Run]) -> list[str]:
    of = (value[name] for name in c.sets() for value in (ACCURACY, CALIBRATION))
    return [percent([value(run) for run in runs]) for value in of]


def unfinished(c: Comparison) -> Table:
    """What is missing, and why."""
    rows = [(name, status.value, said or "-") for name, status, said in c.unfinished]
    note = "Not in the tables above, whose last column says how many seeds they have."
    return Table("unfinished", "Runs that are not finished", note, ("run", "status", "last line of its log"), rows)


def _mean(candidate: Candidate, name: str) -> str:
    value = candidate.mean(name)
    return "-" if value is None else f"{100 * value:.2f}"
