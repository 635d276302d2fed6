"""Runs side by side: a table, a JSON file and a bar chart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rose_ds.config import RoseConfig
from rose_ds.experiments.metrics import ADVERSARIAL, Metrics

_COLUMNS: tuple[tuple[str, Callable[[Metrics], float | None], str], ...] = (
    ("clean", lambda m: m.glue_accuracy, "{:.2%}"),
    ("AdvGLUE", lambda m: m.advglue_accuracy, "{:.2%}"),
    ("perturbed", lambda m: m.perturbed_accuracy, "{:.2%}"),
    ("drop", lambda m: drop(m), "{:.2f}"),
    ("step (s)", lambda m: m.step_seconds, "{:.3f}"),
    ("kept", lambda m: m.kept_fraction, "{:.0%}"),
    ("ECE clean", lambda m: m.glue_ece, "{:.2%}"),
    ("ECE AdvGLUE", lambda m: m.advglue_ece, "{:.2%}"),
    ("ECE perturbed", lambda m: m.perturbed_ece, "{:.2%}"),
)


def drop(metrics: Metrics) -> float | None:
    """Clean minus attacked accuracy in points: the paper's Delta. Attacked is AdvGLUE, else the perturbed set."""
    attacked = metrics.advglue_accuracy if metrics.advglue_accuracy is not None else metrics.perturbed_accuracy
    if metrics.glue_accuracy is None or attacked is None:
        return None
    return 100 * (metrics.glue_accuracy - attacked)


def labels(runs: Sequence[Metrics]) -> list[str]:
    """Each run's method, with the settings of it in which runs of one method differ."""
    found = []
    for m in runs:
        same = [_settings(other) for other in runs if other.method == m.method]
        mine = _settings(m)
        told = [f"{n}={mine.get(n)}" for n in mine if any(other.get(n) != mine[n] for other in same)]
        found.append(" ".join([m.method or "?", *told]))
    return found


def _settings(m: Metrics) -> dict[str, Any]:
    """What a run's method was given other than its seed; a setting at its default may be left out."""
    defaults = {f.name: f.default for f in fields(RoseConfig)}
    rose = {n: v for n, v in (m.config.get("rose") or {}).items() if n != "mask_seed"}
    return {n: v for n, v in {**rose, **(m.config.get("objective") or {})}.items() if v != defaults.get(n)}


def _hostile(runs: Sequence[Metrics]) -> str:
    """What their adversarial sets are called."""
    names = {m.adversarial_name for m in runs if m.advglue_accuracy is not None}
    return names.pop() if len(names) == 1 else ADVERSARIAL


def table(runs: Sequence[Metrics]) -> str:
    """A Markdown table of the runs; columns that no run has a value for are left out."""
    columns = [c for c in _COLUMNS if any(c[1](m) is not None for m in runs)]
    attacks = dict.fromkeys(name for m in runs for name in m.under_attack)
    columns += [(name, lambda m, name=name: m.under_attack.get(name), "{:.2%}") for name in attacks]  # type: ignore[misc]
    hostile = _hostile(runs)
    rows = [["task", "method", "engine", "steps", *(name.replace("AdvGLUE", hostile) for name, _, _ in columns)]]
    for m, label in zip(runs, labels(runs), strict=True):
        values = [(value(m), form) for _, value, form in columns]
        cells = ["-" if value is None else form.format(value) for value, form in values]
        rows.append([m.task, label, f"{m.engine} x{m.world_size}", str(m.steps), *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def write(runs: Sequence[Metrics], folder: Path) -> tuple[Path, Path | None]:
    """Write comparison.json and, where matplotlib is installed, comparison.png; returns the paths.

    Raises:
        ValueError: ``folder`` cannot be written.
    """
    record = folder / "comparison.json"
    rows = [{**asdict(m), "drop": drop(m)} for m in runs]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {record}: {error.strerror}") from error
    return record, _chart(runs, folder / "comparison.png")


def _chart(runs: Sequence[Metrics], path: Path) -> Path | None:
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    sets = [c for c in _COLUMNS[:3] if any(c[1](m) is not None for m in runs)]
    figure, axes = pyplot.subplots(figsize=(1.6 * len(sets) * max(2, len(runs)) * 0.6 + 2, 4))
    width = 0.8 / len(runs)
    for i, (m, label) in enumerate(zip(runs, labels(runs), strict=True)):
        positions = [j + (i - (len(runs) - 1) / 2) * width for j in range(len(sets))]
        heights = [math.nan if (accuracy := value(m)) is None else 100 * accuracy for _, value, _ in sets]
        bars = axes.bar(positions, heights, width * 0.95, label=f"{m.task} {label}")
        axes.bar_label(bars, ["" if math.isnan(height) else f"{height:.1f}" for height in heights], padding=2)
    axes.set_xticks(range(len(sets)), [name.replace("AdvGLUE", _hostile(runs)) for name, _, _ in sets])
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 110)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(frameon=False, loc="upper center", ncols=len(runs)).get_texts():
        text.set_parse_math(False)  # a dollar sign in a name is a dollar sign
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
