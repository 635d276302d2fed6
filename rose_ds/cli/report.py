"""``rose-ds report``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from rose_ds.cli.arguments import HelpFormatter
from rose_ds.experiments.metrics import Metrics
from rose_ds.experiments.report import table, write

_DESCRIPTION = """Runs side by side, or everything that a sweep has found.

Examples:
  rose-ds report runs/vanilla runs/ensemble --output_dir runs/compared
  rose-ds report --store results/minilm
  rose-ds report --store results/minilm --baseline r-drop --output_dir against-r-drop
  rose-ds report --store results/minilm results/lr --output_dir by-learning-rate

Runs: prints a table, writes comparison.json and comparison.png. drop is clean minus attacked accuracy, in points: on
AdvGLUE where there is one, else on the perturbed set.

A store: prints the first table and what is missing, and writes report.md, report.html (one file), report.png and a CSV
file a table: accuracies in the shape of the paper's Tables 1 (methods, tasks), 2 (objectives with masks) and 3 (gamma)
and with every seed, other attacks and cost, differences from the baseline with two tests, the methods at equal clean
accuracy, what was chosen among which settings, and the runs that are not finished. Of stores with several models, each
model has a folder of its own.

The paper that this reproduces makes no automatic attacks: accuracies under attack are of rose-ds attack."""


def run(arguments: Sequence[str]) -> None:
    """Compare finished runs."""
    parser = argparse.ArgumentParser(prog="rose-ds report", description=_DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders with a metrics.json")
    parser.add_argument("--store", nargs="+", type=Path, help="a sweep's folder, or several as one, in place of runs")
    parser.add_argument("--baseline", help="the method to compare the others with; default: vanilla")
    parser.add_argument("--output_dir", type=Path, help="where the files go; default with one --store: report in it")
    options = parser.parse_args(arguments)
    if (options.store is None) == (not options.runs):
        parser.error("give folders of runs, or --store")
    if options.output_dir is None and (options.store is None or len(options.store) > 1):
        parser.error("the following arguments are required: --output_dir")
    if options.store is not None:
        _report_stores(options.store, options.baseline, options.output_dir or options.store[0] / "report")
        return
    runs = [Metrics.read(folder) for folder in options.runs]
    record, chart = write(runs, options.output_dir)
    print(table(runs))
    print(f"written: {record}" + (f", {chart}" if chart else " (no chart: pip install matplotlib)"))


def _plain(model: str) -> str:
    """A folder's name."""
    return re.sub(r"[^\w.-]+", "-", model).strip("-")


def _report_stores(folders: Sequence[Path], baseline: str | None, output: Path) -> None:
    from rose_ds.experiments.comparison import render
    from rose_ds.experiments.comparison.gather import gather, models_in
    from rose_ds.experiments.comparison.published import accuracy
    from rose_ds.experiments.comparison.tables import unfinished
    from rose_ds.experiments.store import Store

    stores = [Store(folder) for folder in folders]
    lines = [key for store in stores for key in store.results()]
    if twice := len(lines) - len(set(lines)):
        print(f"{twice} cells are in several of the stores: of each, the first store's line is used\n")
    models: list[str | None] = [*models_in(stores)]
    for model in models or [None]:
        comparison = gather(stores, baseline, model)
        own = output if len(models) < 2 else output / f"{models.index(model) + 1}-{_plain(str(model))}"
        if own != output:
            render.clear(output)  # of when there was one
        written = render.write(comparison, own)
        missing = unfinished(comparison)
        for shown in [accuracy(comparison), *([missing] if missing.rows else [])]:
            print(render.markdown(shown))
        print("written: " + ", ".join(map(str, written)))
