"""Loss and accuracy on the straight line between two models (Eq. 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from tqdm import tqdm

from rose_ds.analysis.directions import Weights, blend, restored
from rose_ds.analysis.load import Batch
from rose_ds.analysis.movable import Movable
from rose_ds.experiments.resumable import ResumableLog, rank_and_world


@dataclass
class Line:
    """Where on the line."""

    _argument_group_name: ClassVar[str] = "line"

    points: int = field(
        default=41,
        metadata={"help": "So many points from --first to --last; by default 0.05 apart, both models among them."},
    )
    first: float = field(default=-0.5, metadata={"help": "0 is the first model, 1 the second."})
    last: float = field(default=1.5, metadata={"help": "See --first."})

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ValueError(f"points={self.points} must be at least 2")
        if not self.first < self.last:
            raise ValueError(f"first={self.first} must be below last={self.last}")

    def amounts(self) -> list[float]:
        """a of Eq. 7; 0 and 1 are exact where they are among them."""
        span = self.last - self.first
        return [round(self.first + span * i / (self.points - 1), 12) for i in range(self.points)]


def same_architecture(one: nn.Module, other: nn.Module) -> None:
    """Refuse a line between models of two architectures.

    Raises:
        ValueError: names a parameter.
    """
    shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in (one, other)]
    different = sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    if different:
        name = different[0]
        raise ValueError(
            f"the models differ in {len(different)} parameters, such as {name!r}: {shapes[0].get(name)} and "
            f"{shapes[1].get(name)}. There is no line between two architectures"
        )


def walk(
    model: Movable,
    last: Weights,
    sets: Mapping[str, Sequence[Batch]],
    line: Line,
    logs: Sequence[Path],
    subject: dict[str, Any],
) -> None:
    """Loss and accuracy on every set at this rank's points; ``model``, as it is, is at 0, and is then as it was.

    Args:
        last: the weights at 1, of what lies on this rank.
        sets: batches by the name of the set.
        logs, subject: as for ``landscape.surface``.
    """
    rank, _ = rank_and_world()
    with ResumableLog(logs[rank], {**subject, **asdict(line)}) as log, restored(model) as first:
        done = model.agreed({r["point"] for r in log.records})
        bar = tqdm(model.share(range(line.points)), desc="interpolation", unit="point", disable=rank != 0)
        for point in bar:
            if point in done:
                continue
            amount = line.amounts()[point]
            blend(model, first, last, amount)
            record: dict[str, Any] = {"point": point, "a": amount}
            for name, batches in sets.items():
                loss, accuracy = model.measure(batches)
                record |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
            log.append(record)
