"""``rose-ds report``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rose_ds.cli.arguments import HelpFormatter
from rose_ds.experiments.metrics import Metrics
from rose_ds.experiments.report import table, write

_DESCRIPTION = """Runs side by side: prints a table, writes comparison.json and comparison.png.

Example:
  rose-ds report runs/vanilla runs/ensemble --output_dir runs/compared

drop is clean minus attacked accuracy, in points: on AdvGLUE where there is one, else on the perturbed set."""


def run(arguments: Sequence[str]) -> None:
    """Compare finished runs."""
    parser = argparse.ArgumentParser(prog="rose-ds report", description=_DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders with a metrics.json")
    parser.add_argument("--output_dir", type=Path, required=True, help="where comparison.json and comparison.png go")
    options = parser.parse_args(arguments)
    runs = [Metrics.read(folder) for folder in options.runs]
    record, chart = write(runs, options.output_dir)
    print(table(runs))
    print(f"written: {record}" + (f", {chart}" if chart else " (no chart: pip install matplotlib)"))
