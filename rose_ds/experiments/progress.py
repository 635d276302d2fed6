"""How far a sweep is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rose_ds.experiments.cells import Cell

#: tqdm's own estimate takes all cells to be alike.
BAR = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} cells [{elapsed}{postfix}]"


def remaining_seconds(
    waiting: Sequence[Cell], results: Any, jobs: int, running: Sequence[tuple[Cell, float]] = ()
) -> float | None:
    """Time until the last cell ends: each takes the mean of the finished ones that are most like it (task, method,
    model, steps); None where none has been timed.

    Args:
        running: cells under way, and their seconds so far.
    """
    timed = [r for r in results if r["seconds"] is not None]
    if not timed:
        return None

    def expected(cell: Cell) -> float:
        same = [
            (r["task"] == cell.task)
            + (r["method"] == cell.method)
            + sum(r.get("settings", {}).get(name) == cell.settings.get(name) for name in ("model", "max_steps"))
            for r in timed
        ]
        return statistics.mean(r["seconds"] for r, s in zip(timed, same, strict=True) if s == max(same))

    free = [0.0] * jobs
    """When each place is free, if those under way had them first, and whatever waits takes the first that is."""
    left = [max(expected(cell) - so_far, 0.0) for cell, so_far in running]
    for seconds in left + [expected(cell) for cell in waiting]:
        free[free.index(min(free))] += seconds
    return max(free)


def clock(seconds: float) -> str:
    """For a person."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
