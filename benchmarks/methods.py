"""What each method's training step costs beside AdamW's: seconds and peak memory, on MiniLM and real sentences.

    python benchmarks/methods.py --batch 16 --rounds 12

Each method is a process of its own. For time, all of them are alive at once and take turns, a step each in every round
and in a new order, so that a busy moment of the machine meets all alike: a round's seconds are divided by those that
AdamW (vanilla) took in it, and the table has the median of these ratios and their quartiles. A step is one micro-batch:
forward and backward passes, clipping, and the update. Memory is measured first, one method at a time: the kernel's
high-water mark of a process's own memory (see benchmarks/memory.py) with weights, gradients and optimizer states.

The arithmetic beside it counts a forward pass as F, a backward pass as 2F, and one with respect to the embeddings alone
as F. Passes are counted while they run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from itertools import chain, repeat
from pathlib import Path
from typing import Any, cast

from memory import MALLOC, Meter, command_line, write

RESULTS = Path(__file__).parent / "results" / "methods.json"
COMBINATIONS = ("r-drop+rose-first", "smart+rose-second", "freelb+rose-ensemble")
#: Methods with first_order="fast".
FAST = ("rose-first, fast", "rose-ensemble, fast")


# --- one method ---


def passes_counted(stepper: Any, model: Any, batch: int) -> dict[str, float]:
    """Counters that go up as forward passes, backward passes and backward passes to a shift alone (probes) run; by the
    part of the batch's rows that they run over."""
    counts = {"forward": 0.0, "backward": 0.0, "probe": 0.0}
    probing = stepper.engine.probing

    def count(which: str, rows: int) -> None:
        counts[which] += rows / batch

    def probe() -> Any:
        count("probe", batch)
        return probing()

    def after_forward(module: Any, args: Any, output: Any) -> None:
        rows = len(output[0])
        count("forward", rows)
        if output[0].requires_grad:
            output[0].register_hook(lambda grad: count("backward", rows))

    model.base_model.encoder.register_forward_hook(after_forward)
    stepper.engine.probing = probe
    return counts


def serve(job: dict[str, Any]) -> None:
    """Build the method's model and step, then do a step for every line that arrives, and print what it took."""
    import warnings

    warnings.filterwarnings("ignore")
    import torch
    from transformers import logging, set_seed

    from rose_ds import RoseAdamW, Sample, prepare, sample_rows
    from rose_ds.data import get_task, load_task, padding_collator, tokenize
    from rose_ds.experiments.methods import method_named
    from rose_ds.experiments.models import load_model, load_tokenizer

    logging.set_verbosity_error()
    torch.set_num_threads(job["threads"])
    set_seed(0)
    name, _, fast = job["method"].partition(", ")
    spec, method = get_task("snippets"), method_named(name)
    tokenizer, data = load_tokenizer(job["model"]), load_task("snippets", splits=("train",))
    assert data.train is not None
    rows = tokenize(data.train.select(range(job["batch"] * 16)), spec, tokenizer, 128)
    collate = padding_collator(tokenizer)
    batches = [collate([rows[j] for j in range(i, i + job["batch"])]) for i in range(0, len(rows), job["batch"])]
    meter = Meter()
    model = load_model(job["model"], spec).train()
    how = {"first_order": "fast"} if fast else {}
    optimizer = RoseAdamW(model.named_parameters(), lr=2e-5, **method.rose, **how)
    stepper = prepare(model, optimizer, objective=method.objective, max_grad_norm=1.0)
    counts = passes_counted(stepper, model, job["batch"])
    step = iter(chain.from_iterable(repeat(batches)))

    def micro_batch() -> tuple[Any, Any, Any]:
        batch = dict(next(step))  # batches come round again
        labels = batch.pop("labels")
        sample = None
        if fast:
            some, rows = sample_rows(batch)
            sample = Sample(lambda: model(**some).logits, rows)
        return (lambda: model(**batch).logits), (lambda z: torch.nn.functional.cross_entropy(z, labels)), sample

    fisher = 0.0
    if stepper.needs_fisher_pass:
        started = time.perf_counter()
        stepper.fisher_pass([micro_batch()[:2] for _ in range(4)], max_grad_norm=1.0)
        fisher = (time.perf_counter() - started) / 4
    print(json.dumps({"parameters": model.num_parameters(), "fisher_seconds": fisher}), flush=True)
    for _ in sys.stdin:
        before = dict(counts)
        meter.reset()
        started = time.perf_counter()
        forward, loss, sample = micro_batch()
        stepper.backward(forward, loss, sample=sample)
        report = stepper.step()
        seconds = time.perf_counter() - started
        assert report is not None and not report.skipped
        passes = {name: counts[name] - before[name] for name in counts}
        print(json.dumps({"seconds": seconds, "peak": meter.peak(), "passes": passes}), flush=True)


class Worker:
    """A method's process; ``lean``: it gives memory back at once, which shows in the high-water mark and takes time."""

    def __init__(self, job: dict[str, Any], *, lean: bool = False) -> None:
        threads = {"OMP_NUM_THREADS": str(job["threads"])}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(MALLOC if lean else {}), **threads, "TOKENIZERS_PARALLELISM": "false"},
        )
        self.method = job["method"]
        self.said = self._read()
        self.steps: list[dict[str, Any]] = []

    def step(self) -> None:
        """One training step."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.steps.append(self._read())

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return cast("dict[str, Any]", json.loads(line))
        raise SystemExit(f"{self.method} ended with {self.process.wait()}; what it said is above")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


# --- all of them ---


def peak_of(job: dict[str, Any], steps: int = 3) -> int:
    """Bytes at the highest point of a few steps."""
    worker = Worker(job, lean=True)
    try:
        for _ in range(steps):
            worker.step()
    finally:
        worker.close()
    return max(int(step["peak"]) for step in worker.steps)


def measured(workers: list[Worker], warmup: int, peaks: dict[str, int]) -> dict[str, dict[str, Any]]:
    """By method: medians and quartiles of a round's ratios to vanilla, the peak's ratio, the passes of a step."""
    vanilla = next(worker for worker in workers if worker.method == "vanilla")
    found = {}
    for worker in workers:
        steps, base = worker.steps[warmup:], vanilla.steps[warmup:]
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(steps, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        passes = steps[-1]["passes"]
        work = passes["forward"] + 2 * passes["backward"] - passes["probe"]
        found[worker.method] = {
            "seconds": statistics.median(step["seconds"] for step in steps),
            "ratio": middle,
            "ratio_quartiles": [low, high],
            "passes": passes,
            "arithmetic": work / 3,
            "peak_bytes": peaks[worker.method],
            "peak_ratio": peaks[worker.method] / peaks["vanilla"],
            "fisher_ratio": worker.said["fisher_seconds"] / statistics.median(step["seconds"] for step in base),
        }
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown, as docs/methods.md has it."""
    lines = [
        "| method | passes (forward, backward, to embeddings) | arithmetic | seconds | quartiles | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for method, found in results["methods"].items():
        passes, (low, high) = found["passes"], found["ratio_quartiles"]
        backward = passes["backward"] - passes["probe"]
        lines.append(
            f"| {method} | {passes['forward']:g}, {backward:g}, {passes['probe']:g} | {found['arithmetic']:.2f} "
            f"| {found['ratio']:.2f} | {low:.2f} to {high:.2f} | {found['peak_ratio']:.2f} |"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = command_line(__doc__)
    made.add_argument("--methods", nargs="+", metavar="M", help="default: every method and three combinations")
    made.add_argument("--model", default="minilm", help="minilm (default), a folder or a hub id")
    made.add_argument("--batch", type=int, default=16, metavar="N", help="sentences to a step (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=12, metavar="N", help="steps that count (default: %(default)s)")
    made.add_argument("--warmup", type=int, default=3, metavar="N", help="steps that do not (default: %(default)s)")
    made.add_argument("--threads", type=int, default=2, metavar="N", help="of each process (default: %(default)s)")
    made.add_argument("--output", type=Path, default=RESULTS, help="results file (default: %(default)s)")
    made.add_argument("--table", action="store_true", help="print the file's results as a table, measure nothing")
    made.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Measure, write the results, print the table."""
    options = parser().parse_args()
    if options.serve is not None:
        serve(options.serve)
        return
    if options.table:
        print(table(json.loads(options.output.read_text())))
        return
    from tqdm import tqdm

    from rose_ds.experiments import provenance
    from rose_ds.experiments.methods import METHODS

    methods = list(dict.fromkeys(["vanilla", *(options.methods or (*METHODS, *FAST, *COMBINATIONS))]))
    settings = {name: getattr(options, name) for name in ("model", "batch", "threads")}
    peaks = {method: peak_of({**settings, "method": method}) for method in tqdm(methods, desc="memory")}
    workers: list[Worker] = []
    try:
        for method in tqdm(methods, desc="starting"):
            workers.append(Worker({**settings, "method": method}))
        for _ in tqdm(range(options.warmup + options.rounds), desc="rounds"):
            for worker in random.sample(workers, len(workers)):
                worker.step()
    finally:
        for worker in workers:
            worker.close()
    results = {
        "command": "python benchmarks/methods.py "
        + " ".join(f"--{n} {getattr(options, n)}" for n in ("model", "batch", "rounds", "warmup", "threads"))
        + (f" --methods {shlex.join(options.methods)}" if options.methods else ""),
        "kernels": os.environ.get("ROSE_DS_KERNELS", "auto"),
        "commit": provenance.commit(),
        "packages": provenance.packages(),
        "parameters": workers[0].said["parameters"],
        "methods": measured(workers, options.warmup, peaks),
    }
    write(options.output, results)
    print(table(results))


if __name__ == "__main__":
    main()
