"""The loss around a trained model, in a plane (Eq. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from rose_ds.analysis.directions import move, restored
from rose_ds.analysis.load import Batch
from rose_ds.analysis.movable import Movable
from rose_ds.experiments.resumable import ResumableLog, rank_and_world, records_of


@dataclass
class Plane:
    """Where the loss is looked at."""

    _argument_group_name: ClassVar[str] = "plane"

    points: int = field(default=51, metadata={"help": "So many points a side; odd, so that the model is one of them."})
    radius: float = field(default=0.25, metadata={"help": "Steps of -radius to radius along both directions."})
    direction_seed: int = field(default=0, metadata={"help": "Seed of the two Gaussian directions."})

    def __post_init__(self) -> None:
        if self.points < 3 or self.points % 2 == 0:
            raise ValueError(f"points={self.points} must be odd, and at least 3")
        if not 0 < self.radius < 10:
            raise ValueError(f"radius={self.radius} must be above 0 and below 10")

    def steps(self) -> list[float]:
        """Along a side; the middle is exactly 0."""
        half = self.points // 2
        return [self.radius * i / half for i in range(-half, half + 1)]


def surface(
    model: Movable, batches: Sequence[Batch], plane: Plane, logs: Sequence[Path], subject: dict[str, Any]
) -> None:
    """Loss and accuracy at this rank's points, each written to this rank's log as it is found.

    The weights are those from before afterwards, to the last bit.

    Args:
        logs: of all ranks.
        subject: what is looked at, in words that the log keeps.
    """
    rank, _ = rank_and_world()
    steps = plane.steps()
    mine = model.share([(i, j) for i in range(plane.points) for j in range(plane.points)])
    with ResumableLog(logs[rank], {**subject, **asdict(plane)}) as log, restored(model) as start:
        done = model.agreed({(r["i"], r["j"]) for r in log.records})
        one, other = (model.direction(2 * plane.direction_seed + k) for k in range(2))
        bar = tqdm(mine, desc=f"landscape {subject['name']}", unit="point", disable=rank != 0)
        for i, j in bar:
            if (i, j) in done:
                continue
            move(model, start, [(steps[i], one), (steps[j], other)])
            loss, accuracy = model.measure(batches)
            log.append({"i": i, "j": j, "loss": loss, "accuracy": accuracy})


def gathered(logs: Sequence[Path], points: int) -> dict[str, list[list[float]]]:
    """``loss`` and ``accuracy``, (points, points): row i is the step along the first direction.

    Raises:
        ValueError: a point is missing.
    """
    found = {name: np.full((points, points), np.nan) for name in ("loss", "accuracy")}
    for record in records_of(logs):
        for name, table in found.items():
            table[record["i"], record["j"]] = record[name]
    missing = int(np.isnan(found["accuracy"]).sum())
    if missing:
        raise ValueError(f"{missing} of {points**2} points are missing in {', '.join(map(str, logs))}")
    return {name: table.tolist() for name, table in found.items()}
