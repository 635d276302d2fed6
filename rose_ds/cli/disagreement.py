"""``rose-ds dropout-disagreement``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from rose_ds.cli import first_rank
from rose_ds.cli.analyses import parse

_DESCRIPTION = """How often two passes with dropout give an item two answers (Table 4): of finished models.

Example:
  rose-ds dropout-disagreement runs/vanilla runs/ensemble

During training, rose-ds train --disagreement_steps 200 600 2000 measures it on the dev set along the way; methods with
two dropout passes log it of their own training rows as rose/disagreement. Writes dropout-disagreement.json."""


@dataclass
class Draws:
    """How it is measured."""

    _argument_group_name: ClassVar[str] = "passes"

    split: str = field(default="validation", metadata={"help": "train, validation, adversarial or perturbed."})
    draws: int = field(default=5, metadata={"help": "So many pairs of passes, for mean and spread."})
    dropout_seed: int = field(default=0, metadata={"help": "Seed of the dropout masks."})

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws={self.draws} must be at least 1")


def run(arguments: Sequence[str]) -> None:
    """Measure and print."""
    models, given, (rows, how) = parse(
        "dropout-disagreement", _DESCRIPTION, arguments, Draws, models="folders of trained models, or hub ids"
    )
    if not first_rank():
        return  # it is a minute's work
    from rose_ds.analysis.disagreement import disagreement
    from rose_ds.analysis.load import open_run, output_folder, splits_for, write_result

    folder = output_folder(models, rows.output_dir)
    found: dict[str, dict[str, Any]] = {}
    for model in models:
        opened = open_run(model, given, splits=splits_for(how.split))
        if opened.name in found:
            raise ValueError(f"two of the models have the same name, {opened.name}: rename a folder")
        batches = opened.batches(how.split, rows.rows, rows.batch_size)
        found[opened.name] = {
            "model": model,
            "task": opened.data.spec.name,
            "disagreement": disagreement(opened.model, batches, how.draws, how.dropout_seed),
        }
    path = write_result(folder, "dropout-disagreement", {"settings": {**asdict(rows), **asdict(how)}, "models": found})
    print("| model | disagreement | spread over draws |\n| --- | --- | --- |")
    for name, one in found.items():
        values = one["disagreement"]
        spread = f"{statistics.stdev(values):.2%}" if len(values) > 1 else "-"
        print(f"| {name} | {statistics.fmean(values):.2%} | {spread} |")
    print(f"written: {path}")
