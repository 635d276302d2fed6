"""``rose-ds doctor``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from rose_ds.cli import first_rank
from rose_ds.cli.arguments import Parser
from rose_ds.doctor.finding import any_failed, record
from rose_ds.doctor.questions import Questions

_DESCRIPTION = """Check an environment before a long run: one line for each check, and what to mend.

Examples:
  rose-ds doctor
  rose-ds doctor --model roberta-large --deepspeed ds_configs/zero2_bf16.json --world_size 8 --output_dir /data/runs
  torchrun --nproc_per_node 8 -m rose_ds doctor --output_dir /data/runs
  deepspeed --hostfile launch/cluster/hostfile --module rose_ds doctor --deepspeed ds_configs/zero3_bf16.json
  rose-ds doctor --json | python -m json.tool

Started as one process it looks at this host: versions, compiler, GPU, config, memory, disk. Started by the launcher of
the run it also looks between hosts: every rank reachable, sums right, one exact threshold, one output folder.
Exit code 0: nothing failed, warnings or not. 1: something failed. It trains nothing, and leaves no files."""


def run(arguments: Sequence[str]) -> None:
    """Check, print, and exit with 1 if a check failed."""
    (asked,) = Parser("doctor", _DESCRIPTION, Questions).settings(arguments)
    with _libraries_on_stderr() if asked.json else nullcontext():
        from rose_ds.doctor.examine import examine  # which imports all there is

        findings, world = examine(asked, os.environ)
    alone = any(finding.check == "ranks" and finding.status == "failed" for finding in findings)
    if first_rank() or alone:  # where ranks are missing, each that is there says what it saw
        if asked.json:
            print(json.dumps(record(findings, world)))
        else:
            print("\n".join(finding.line() for finding in findings), flush=True)
            _sum_up([finding.status for finding in findings])
    if any_failed(findings):
        raise SystemExit(1)


@contextmanager
def _libraries_on_stderr() -> Iterator[None]:
    """What they print must not stand before the JSON: DeepSpeed warns on standard output that there is no GPU."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _sum_up(statuses: list[str]) -> None:
    count = {status: statuses.count(status) for status in ("ok", "warning", "failed")}
    print(f"{count['ok']} ok, {count['warning']} to look at, {count['failed']} to mend")
