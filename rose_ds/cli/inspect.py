"""``rose-ds inspect``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rose_ds.cli import first_rank
from rose_ds.cli.arguments import HelpFormatter

_DESCRIPTION = """What the masks of finished runs did, on one page: which layers they kept and when, the thresholds, the
risks, and how stable the masks were.

Examples:
  rose-ds inspect runs/ensemble
  rose-ds inspect runs/first runs/second runs/ensemble --output masks.html

rose-ds train records it (masks.jsonl, every 50 steps; --record_masks). The page is one file and needs no network."""


def run(arguments: Sequence[str]) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="rose-ds inspect", description=_DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that rose-ds train wrote")
    parser.add_argument("--output", type=Path, help="the page; default: analysis/inspect.html in the first run")
    options = parser.parse_args(arguments)
    if not first_rank():
        return
    from rose_ds.analysis.inspect_page import Record, write_page
    from rose_ds.training.mask_record import FILE, read_masks

    records = []
    for run_folder in options.runs:
        if not (run_folder / FILE).is_file():
            raise ValueError(
                f"{run_folder} has no {FILE}: a method without masks, or a run with --record_masks 0; rose-ds train "
                "writes it for strategies that mask"
            )
        records.append(Record(run_folder.name, *read_masks(run_folder / FILE)))
    print(f"written: {write_page(records, options.output or options.runs[0] / 'analysis' / 'inspect.html')}")
