"""One table of a report, and how its figures are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rose_ds.experiments.comparison.statistics import mean_sd


@dataclass(frozen=True)
class Table:
    """One table."""

    key: str
    """Its file's name."""
    title: str
    note: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def percent(values: Sequence[float | None], scale: float = 100.0, digits: int = 2) -> str:
    """Mean and standard deviation; "-" where there is nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean, sd = mean_sd([scale * value for value in known])
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")
