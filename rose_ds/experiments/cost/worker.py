"""One method's model and training step, in a process (one for each rank) of its own: a step for every line."""

from __future__ import annotations

import json
import sys
import time
import warnings
from itertools import chain, repeat
from typing import Any

import torch
from transformers import logging, set_seed

from rose_ds import Sample, Stepper, sample_rows
from rose_ds.data import padding_collator, tokenize
from rose_ds.experiments.cost.engines import Placement, join
from rose_ds.experiments.cost.memory import meter_for
from rose_ds.experiments.loading import load_data
from rose_ds.experiments.methods import method_named
from rose_ds.experiments.models import load_model, load_tokenizer
from rose_ds.experiments.settings import RunSettings

_BATCHES = 16  # different ones, which come round again


def passes_counted(stepper: Stepper, model: Any, batch: int, micro_batch: int) -> dict[str, float]:
    """Counters that go up as forward passes, backward passes and backward passes to a shift alone (probes) run; by the
    part of the batch's rows that they run over. A probe's are a micro-batch.
    """
    counts = {"forward": 0.0, "backward": 0.0, "probe": 0.0}
    probing = stepper.engine.probing

    def count(which: str, rows: int) -> None:
        counts[which] += rows / batch

    def probe() -> Any:
        count("probe", micro_batch)
        return probing()

    def after_forward(module: Any, args: Any, output: Any) -> None:
        logits = output.logits
        rows = len(logits)
        count("forward", rows)
        if logits.requires_grad:
            logits.register_hook(lambda grad: count("backward", rows))

    model.register_forward_hook(after_forward)
    stepper.engine.probing = probe  # type: ignore[method-assign]
    return counts


def serve(job: dict[str, Any]) -> None:
    """Build the method's model, then take a step for every line of stdin and print what it took, one JSON object each.

    One rank of as many as the environment says (RANK, WORLD_SIZE, ...), each of which is given the same lines.

    Args:
        job: ``method`` (with ", fast" or ", halves" behind it: first_order), ``run`` (fields of RunSettings),
            ``engine``, ``batch_size`` (rows of a rank's step), ``accumulation``, ``bf16``, ``threads``.
    """
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(job["threads"])
    set_seed(0)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    rank, ranks = join(device)
    name, _, first_order = job["method"].partition(", ")
    run, method, accumulation = RunSettings(**job["run"]), method_named(name), job["accumulation"]
    size = job["batch_size"] // accumulation
    tokenizer, data = load_tokenizer(run.model), load_data(run, splits=("train",))
    assert data.train is not None
    wanted = data.train.select(range(min(size * ranks * _BATCHES, len(data.train) // (size * ranks) * size * ranks)))
    rows = tokenize(wanted, data.spec, tokenizer, run.max_length)
    collate = padding_collator(tokenizer)
    mine = range(rank * size, len(rows), ranks * size)
    batches = [collate([rows[j] for j in range(i, i + size)]) for i in mine]
    meter = meter_for(device)
    where = Placement(job["engine"], size, accumulation, job["bf16"], device)
    inner = load_model(run.model, data.spec).train()
    parameters = inner.num_parameters()
    rose = {**method.rose, **({"first_order": first_order} if first_order else {})}
    model, stepper = where.place(inner, rose, method.objective)
    counts = passes_counted(stepper, inner, job["batch_size"], size)
    endless = iter(chain.from_iterable(repeat(batches)))

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize()

    def forward_of(inputs: Any) -> Any:
        with where.autocast():
            return model(**inputs).logits

    def micro_batch() -> tuple[Any, Any, Any]:
        batch = {key: value.to(device) for key, value in next(endless).items()}
        labels = batch.pop("labels")
        sample = None
        if first_order == "fast":
            some, picked = sample_rows(batch)
            sample = Sample(lambda: forward_of(some), picked)
        return (
            lambda: forward_of(batch),
            lambda z: torch.nn.functional.cross_entropy(z.float(), labels),
            sample,
        )

    fisher = 0.0
    if stepper.needs_fisher_pass:
        started = time.perf_counter()
        stepper.fisher_pass([micro_batch()[:2] for _ in range(4)], max_grad_norm=1.0)
        wait()
        fisher = (time.perf_counter() - started) / 4 * accumulation
    print(json.dumps({"parameters": parameters, "fisher_seconds": fisher}), flush=True)
    for _ in sys.stdin:
        before = dict(counts)
        meter.reset()
        wait()
        started = time.perf_counter()
        for _ in range(accumulation):
            forward, loss, sample = micro_batch()
            stepper.backward(forward, loss, sample=sample)
            report = stepper.step()
        wait()
        seconds = time.perf_counter() - started
        if report is None or report.skipped:
            raise RuntimeError(f"{job['method']}: a gradient was not finite, so the step's time says nothing")
        passes = {which: counts[which] - before[which] for which in counts}
        print(json.dumps({"seconds": seconds, "peak": meter.peak(), "passes": passes}), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
