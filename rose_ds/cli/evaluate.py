"""``rose-ds evaluate``."""

from __future__ import annotations

from collections.abc import Sequence

from rose_ds.cli import first_rank
from rose_ds.cli.arguments import OF_TRAINING, Parser, RunArguments
from rose_ds.experiments.settings import RunSettings

_DESCRIPTION = """Accuracy of a trained classifier on a task's clean, adversarial and perturbed dev sets.

Example:
  rose-ds evaluate --model runs/sst2 --output_dir runs/sst2-evaluated
  rose-ds evaluate --model runs/mine --validation_file other.csv --text_columns body --output_dir other

Task, data and length are those of the model's run, unless flags say which rows to read.

Writes metrics.json and predictions.jsonl, the answer to every item, to --output_dir."""


def run(arguments: Sequence[str]) -> None:
    """Evaluate, and print what was measured."""
    parser = Parser("evaluate", _DESCRIPTION, RunSettings, RunArguments)
    parser.refuse(("engine", *OF_TRAINING), "it is about training, and nothing is trained here; leave it out")
    parser.require_model()
    parser.explain_trained()
    settings, args = parser.settings(arguments)
    from rose_ds.experiments.loading import settings_of
    from rose_ds.experiments.train import evaluate

    settings = settings_of(settings.model, parser.given(arguments))
    metrics = evaluate(settings, args)
    if first_rank():
        print(metrics.summary())
