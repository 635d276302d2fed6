"""``rose-ds evaluate``."""

from __future__ import annotations

from collections.abc import Sequence

from rose_ds.cli.arguments import Parser, RunArguments, first_rank
from rose_ds.experiments.settings import RunSettings

_DESCRIPTION = """Accuracy of a trained classifier on a task's clean, adversarial and perturbed dev sets.

Example:
  rose-ds evaluate --task sst2 --data glue/ --model runs/sst2 --output_dir runs/sst2-evaluated

Writes metrics.json to --output_dir."""


def run(arguments: Sequence[str]) -> None:
    """Evaluate, and print what was measured."""
    settings, args = Parser("evaluate", _DESCRIPTION, RunSettings, RunArguments).settings(arguments)
    from rose_ds.experiments.train import evaluate

    metrics = evaluate(settings, args)
    if first_rank():
        print(metrics.summary())
