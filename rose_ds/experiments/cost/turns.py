"""Training steps of several methods, in turns: what each takes beside AdamW's.

Each method is a process of its own, or one for each rank. For time, all of them are alive at once and take turns, a
step each in every round and in a new order, so that a busy moment of the machine meets all alike: a round's seconds are
divided by those that AdamW (vanilla) took in it. Memory is measured first, one method at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from queue import Queue
from typing import Any, cast

from rose_ds.experiments import provenance
from rose_ds.experiments.cost.memory import MALLOC
from rose_ds.experiments.launchers import free_port

BASELINE = "vanilla"
_MEMORY_STEPS = 3
#: Variables that say which rank a process is.
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Worker:
    """A method's processes, one a rank; ``lean``: they give memory back at once, which shows in the high-water mark and
    takes time.
    """

    def __init__(self, job: Mapping[str, Any], *, lean: bool = False) -> None:
        threads = {"OMP_NUM_THREADS": str(job["threads"])}
        inherited = {name: value for name, value in os.environ.items() if name not in _RANKS}
        common = {**inherited, **(MALLOC if lean else {}), **threads, "TOKENIZERS_PARALLELISM": "false"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "rose_ds.experiments.cost.worker", json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**common, **place},
            )
            for place in _places(job["engine"], job["ranks"])
        ]
        self.method = job["method"]
        self.steps: list[dict[str, Any]] = []
        self._lines: Queue[tuple[int, str | None]] = Queue()
        for rank in range(len(self.processes)):
            threading.Thread(target=self._listen, args=(rank,), daemon=True).start()
        try:
            self.said = self._read()[0]
        except BaseException:
            self.close()
            raise

    def step(self) -> None:
        """One training step: as long as the slowest rank, and as large as the largest."""
        for process in self.processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended: reading says how
                process.stdin.write("\n")
                process.stdin.flush()
        found = self._read()
        peaks = [one["peak"] for one in found]
        seconds = max(one["seconds"] for one in found)
        self.steps.append({**found[0], "seconds": seconds, "peak": None if None in peaks else max(peaks)})

    def _read(self) -> list[dict[str, Any]]:
        """What each rank says next; whichever ends ends all, as the others would wait for it."""
        found: list[dict[str, Any] | None] = [None] * len(self.processes)
        while None in found:
            rank, line = self._lines.get()
            if line is None:
                code = self.processes[rank].wait()
                how = f"its process ended with {code}; what it said is above"
                if code == -signal.SIGKILL:
                    how = (
                        "its process was killed, as Linux does where memory runs out: all methods are in memory at "
                        "once, so measure fewer --methods in a run, or on fewer --ranks"
                    )
                raise RuntimeError(f"{self.method}: {how}")
            if line.startswith("{"):
                found[rank] = json.loads(line)
        return cast("list[dict[str, Any]]", found)

    def _listen(self, rank: int) -> None:
        """To all that it says: a full pipe would stop it."""
        stream = self.processes[rank].stdout
        assert stream is not None
        for line in stream:
            self._lines.put((rank, line))
        self._lines.put((rank, None))

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.wait()


def _places(engine: str, ranks: int) -> list[dict[str, str]]:
    """Each rank's part of the environment; none for an engine that knows no ranks."""
    if engine == "plain":
        return [{}]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def measure(
    methods: Sequence[str],
    settings: Mapping[str, Any],
    *,
    rounds: int,
    warmup: int,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _: items,
) -> dict[str, Any]:
    """Peaks of memory, then rounds of steps.

    Args:
        methods: names of methods and combinations, ``", fast"`` or ``", halves"`` behind those that are to have this
            first_order; ``vanilla`` is added where it is missing.
        settings: of a worker's job, beside the method.
        rounds: steps of each method that count.
        warmup: steps before them that do not.
        progress: wraps what is gone through, with a text that says what it is.

    Returns:
        ``parameters``; ``methods``: by name ``seconds`` (median of a step), ``ratio`` to vanilla (median over rounds)
        and ``ratio_quartiles``, ``passes`` of a step, ``arithmetic`` (what these cost beside vanilla's, a forward pass
        F, a backward pass 2F, one to the embeddings alone F), ``peak_bytes`` and ``peak_ratio`` (None where memory
        cannot be measured), ``fisher_ratio`` (a batch of the Fisher pass); and where it was measured.

    Raises:
        RuntimeError: a method's process ended.
    """
    methods = list(dict.fromkeys([BASELINE, *methods]))
    peaks = {method: _peak_of({**settings, "method": method}) for method in progress(methods, "memory")}
    workers: list[Worker] = []
    try:
        for method in progress(methods, "starting"):
            workers.append(Worker({**settings, "method": method}))
        for _ in progress(range(warmup + rounds), "rounds"):
            for worker in random.sample(workers, len(workers)):
                worker.step()
    finally:
        for worker in workers:
            worker.close()
    return {
        "kernels": os.environ.get("ROSE_DS_KERNELS", "auto"),
        "commit": provenance.commit(),
        "packages": provenance.packages(),
        "hardware": provenance.hardware(),
        "parameters": workers[0].said["parameters"],
        "methods": {worker.method: _figures(worker, workers[0], warmup, peaks) for worker in workers},
    }


def _peak_of(job: Mapping[str, Any]) -> int | None:
    worker = Worker(job, lean=True)
    try:
        for _ in range(_MEMORY_STEPS):
            worker.step()
    finally:
        worker.close()
    peaks = [step["peak"] for step in worker.steps]
    return None if None in peaks else max(peaks)


def _figures(worker: Worker, vanilla: Worker, warmup: int, peaks: Mapping[str, int | None]) -> dict[str, Any]:
    steps, base = worker.steps[warmup:], vanilla.steps[warmup:]
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(steps, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    passes = steps[-1]["passes"]
    peak, least = peaks[worker.method], peaks[vanilla.method]
    return {
        "seconds": statistics.median(step["seconds"] for step in steps),
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "passes": passes,
        "arithmetic": (passes["forward"] + 2 * passes["backward"] - passes["probe"]) / 3,
        "peak_bytes": peak,
        "peak_ratio": peak / least if peak and least else None,
        "fisher_ratio": worker.said["fisher_seconds"] / statistics.median(step["seconds"] for step in base),
    }


def table(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, a line each."""
    lines = [
        "| method | passes (forward, backward, to embeddings) | arithmetic | seconds | quartiles | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for method, found in methods.items():
        passes, (low, high) = found["passes"], found["ratio_quartiles"]
        backward = passes["backward"] - passes["probe"]
        peak = "-" if found["peak_ratio"] is None else f"{found['peak_ratio']:.2f}"
        lines.append(
            f"| {method} | {passes['forward']:g}, {backward:g}, {passes['probe']:g} | {found['arithmetic']:.2f} "
            f"| {found['ratio']:.2f} | {low:.2f} to {high:.2f} | {peak} |"
        )
    return "\n".join(lines)


def plot(methods: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Bars: measured ratios with their quartiles, and a mark where arithmetic puts them."""
    from matplotlib.figure import Figure

    names = list(methods)[::-1]
    ratios = [methods[name]["ratio"] for name in names]
    ends = [methods[name]["ratio_quartiles"] for name in names]
    spread = [
        [max(r - low, 0) for r, (low, _) in zip(ratios, ends, strict=True)],
        [max(high - r, 0) for r, (_, high) in zip(ratios, ends, strict=True)],
    ]
    figure = Figure(figsize=(7, 1 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, ratios, xerr=spread, color="#8fb3d9", ecolor="#444444", height=0.65)
    axes.plot([methods[name]["arithmetic"] for name in names], names, "k|", markersize=11, label="by arithmetic")
    axes.axvline(1, color="#999999", linewidth=0.8)
    axes.set_xlabel("seconds of a training step, AdamW = 1")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
