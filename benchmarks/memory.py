"""How much memory a ROSE step takes beside an AdamW step, per rank, measured on CPU ranks of this machine.

    python benchmarks/memory.py --model roberta-large --stage 3 --ranks 1 2 4 --strategy none second ensemble

Every combination of ranks and strategy is a training run of its own: a randomly initialised RoBERTa with a
classification head takes a few real steps on a few sentences. Results go to a JSON file, one entry a combination;
combinations that are in the file already are kept, so that an interrupted measurement goes on where it stopped.

What is measured: memory that belongs to the rank alone (the kernel's high-water mark, reset before each phase, less
file-backed and shared pages) above what the process took after its imports. glibc is told to give every larger block
back to the system when it is freed, so the mark follows live tensors. Only Linux counts this way.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rose_ds.experiments.cost.memory import MALLOC, Meter

RESULTS = Path(__file__).parent / "results" / "memory.json"
STRATEGIES = ("none", "first", "second", "ensemble")

#: RobertaConfig's arguments; dropout is its default, 0.1
MODELS: dict[str, dict[str, int]] = {
    "small": dict(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=6, vocab_size=4000
    ),
    "roberta-base": dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=50265
    ),
    "roberta-large": dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, vocab_size=50265
    ),
}

SENTENCES = (
    ("The plot runs in circles, but the two leads are a joy to watch from start to end.", 1),
    ("Two hours of noise, and not one scene that I could still name the next morning.", 0),
    ("A quiet film about work and weather that earns every one of its few big moments.", 1),
    ("It wants to be a comedy and a warning, and in the end it manages to be neither.", 0),
)
LENGTH = 16

PHASES = {
    "model": "model built (stage 3: under deepspeed.zero.Init)",
    "engine": "deepspeed.initialize() and rose_ds.prepare() done",
    "backward": "peak of Stepper.backward(), all micro-batches of a step",
    "step": "peak of Stepper.step()",
}


# --- one rank ---


def ds_config(job: dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed config whose buckets are small, so that what is measured grows with the model."""
    precision = {"bf16": {"enabled": True}} if job["precision"] == "bf16" else {}
    return {
        "train_micro_batch_size_per_gpu": job["batch"],
        "gradient_accumulation_steps": job["accumulation"],
        "gradient_clipping": 1.0,
        "optimizer": {"type": "RoseAdamW", "params": {"lr": 1e-5, "strategy": job["strategy"]}},
        "zero_optimization": {
            "stage": job["stage"],
            "reduce_bucket_size": 1_000_000,
            "allgather_bucket_size": 1_000_000,
            "stage3_prefetch_bucket_size": 1_000_000,
            "stage3_max_live_parameters": 5_000_000,  # by default all of a model of this size may stay gathered
            "stage3_max_reuse_distance": 0,
        },
        **precision,
    }


def batch_of(job: dict[str, Any], rank: int, micro: int) -> tuple[Any, Any]:
    """Real sentences, whose words are numbered by a hash: the model is random, so any numbering is as good."""
    import torch

    vocabulary = MODELS[job["model"]]["vocab_size"]
    rows, labels = [], []
    for i in range(job["batch"]):
        text, label = SENTENCES[(rank + micro + i) % len(SENTENCES)]
        words = [3 + int(hashlib.sha256(w.encode()).hexdigest(), 16) % (vocabulary - 3) for w in text.lower().split()]
        rows.append([0, *words[: LENGTH - 2], 2] + [1] * (LENGTH - 2 - len(words)))  # <s> words </s> <pad>
        labels.append(label)
    return torch.tensor(rows), torch.tensor(labels)


def fsdp(model: Any, job: dict[str, Any]) -> Any:
    """The model sharded layer by layer, in the precision asked for, its sums in fp32."""
    import torch
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    layers = model.roberta.encoder.layer
    low = torch.bfloat16 if job["precision"] == "bf16" else None
    if job["engine"] == "fsdp1":
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({type(layers[0])}),
            mixed_precision=MixedPrecision(param_dtype=low, reduce_dtype=torch.float32) if low else None,
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None)
    for layer in layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run the job on this rank."""
    import contextlib
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    import deepspeed
    import torch
    import torch.nn.functional as F
    from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaPreTrainedModel

    import rose_ds

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    rank = int(os.environ["RANK"])
    config = RobertaConfig(**MODELS[job["model"]], max_position_embeddings=130)

    # torch's own random weights stay: transformers' initialisation cannot see partitioned parameters
    RobertaPreTrainedModel._init_weights = lambda self, module: None
    # what a first model imports is not the model
    RobertaForSequenceClassification(
        RobertaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    settings, zero = ds_config(job), job["engine"] == "zero"
    meter, found, seconds = Meter(), {}, []
    meter.reset()
    partitioned = zero and job["stage"] == 3
    init = deepspeed.zero.Init(config_dict_or_path=settings) if partitioned else contextlib.nullcontext()
    with init:
        model = RobertaForSequenceClassification(config)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    found["model"] = {"peak": meter.peak(), "after": meter.current()}
    meter.reset()
    if zero:
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
        stepper = rose_ds.prepare(engine)
    else:
        engine = fsdp(model, job)
        optimizer = rose_ds.RoseAdamW(engine.named_parameters(), lr=1e-5, strategy=job["strategy"])
        stepper = rose_ds.prepare(engine, optimizer, accumulation_steps=job["accumulation"], max_grad_norm=1.0)
    engine.train()
    found["engine"] = {"peak": meter.peak(), "after": meter.current()}
    found["backward"] = found["step"] = {"peak": 0, "after": 0}
    torch.manual_seed(1 + rank)
    for t in range(job["steps"]):
        started = time.monotonic()
        peaks = {"backward": 0, "step": 0}
        for micro in range(job["accumulation"]):
            ids, labels = batch_of(job, rank, t + micro)
            meter.reset()
            stepper.backward(
                lambda ids=ids: engine(input_ids=ids, attention_mask=(ids != 1).long()).logits,
                lambda logits, labels=labels: F.cross_entropy(logits.float(), labels),
            )
            peaks["backward"] = max(peaks["backward"], meter.peak())
            meter.reset()
            report = stepper.step()
            peaks["step"] = max(peaks["step"], meter.peak())
        assert report is not None and not report.skipped
        seconds.append(round(time.monotonic() - started, 2))
        for phase, peak in peaks.items():
            found[phase] = {"peak": max(peak, found[phase]["peak"]), "after": meter.current()}
        if rank == 0:
            print(f"    step {t + 1}/{job['steps']}: {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    return {
        "parameters": parameters,
        "eligible": stepper.engine.layout.element_count,
        "kept_fraction": report.kept_fraction,
        "step_seconds": seconds,
        "phases": found,
    }


# --- all ranks of a job ---


def _free_port() -> str:
    """A port below those that the system hands out to others in the meantime."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return str(port)


def run_job(job: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Start the job's ranks, wait, and put their results together.

    Raises:
        RuntimeError: a rank failed or none was done in time; with what it wrote last.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(job["ranks"]):
            env = {
                **os.environ,
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"])},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
                **MALLOC,
            }
            out = f"{folder}/{rank}.json"
            command = [sys.executable, __file__, "--rank-of", json.dumps(job), "--output", out]
            log = Path(folder, f"{rank}.log").open("w")  # noqa: SIM115  open while the rank runs
            ranks.append((subprocess.Popen(command, env=env, stdout=log, stderr=sys.stderr if rank == 0 else log), log))
        deadline = time.monotonic() + timeout
        try:
            while any(process.poll() is None for process, _ in ranks):
                if any(process.poll() for process, _ in ranks) or time.monotonic() > deadline:
                    break
                time.sleep(0.2)
        finally:
            for process, log in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()
                log.close()
        results = []
        for rank, (process, _) in enumerate(ranks):
            path = Path(folder, f"{rank}.json")
            if process.returncode or not path.exists():
                said = Path(folder, f"{rank}.log").read_text()[-2000:]
                raise RuntimeError(f"rank {rank} of {job['ranks']} ended with {process.returncode}\n{said}")
            results.append(json.loads(path.read_text()))
    shared = {key: results[0][key] for key in ("parameters", "eligible", "kept_fraction", "step_seconds")}
    return {**job, **shared, "ranks_phases": [result["phases"] for result in results]}


def engine_of(job: dict[str, Any]) -> str:
    """Its name; older results have DeepSpeed's alone."""
    return f"zero{job['stage']}" if job.get("engine", "zero") == "zero" else str(job["engine"])


def key_of(job: dict[str, Any]) -> str:
    """The job's name in the results."""
    extra = f"accumulation{job['accumulation']} batch{job['batch']} steps{job['steps']}"
    return f"{job['model']} {engine_of(job)} {job['precision']} x{job['ranks']} {job['strategy']} {extra}"


def write(path: Path, results: dict[str, Any]) -> None:
    """Write all at once, so that an interruption leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def origin(command: str) -> dict[str, Any]:
    """What a results file says of where it comes from."""
    from rose_ds.experiments import provenance

    return {"command": command, "commit": provenance.commit(), "packages": provenance.packages()}


def compared(took: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """A way's seconds by round beside those of another in the same rounds: medians, and the quartiles of the ratio."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(took, base, strict=True)], n=4)
    return {"seconds": statistics.median(took), "ratio": middle, "ratio_quartiles": [low, high]}


def read(path: Path) -> dict[str, Any]:
    """Results so far."""
    if not path.exists():
        return {"runs": {}}
    try:
        results: dict[str, Any] = json.loads(path.read_text())
        assert isinstance(results["runs"], dict)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise SystemExit(f"{path} is not a result of this program: name another --output") from None
    return results


# --- what it says ---


def peak(run: dict[str, Any], phase: str) -> int:
    """The highest of the ranks' peaks in a phase."""
    return max(int(rank[phase]["peak"]) for rank in run["ranks_phases"])


def table(results: dict[str, Any]) -> str:
    """Markdown: GiB at the peak of each phase on the rank with the most, the sum of all ranks' highest peaks, and what
    the two phases of a step take above "none" for each parameter of the share that a rank has at stage 3."""
    runs = results["runs"].values()
    lines = [
        "| model | ranks | strategy | built | engine | backward | step | all ranks | extra backward | extra step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in sorted(runs, key=lambda r: (r["model"], engine_of(r), r["accumulation"], r["ranks"], r["strategy"])):
        plain = results["runs"].get(key_of({**run, "strategy": "none"}))
        gib = [f"{peak(run, phase) / 2**30:.2f}" for phase in PHASES]
        total = sum(max(rank[phase]["peak"] for phase in PHASES) for rank in run["ranks_phases"])
        compared = plain is not None and plain is not run
        extra = [f"{extra_bytes(run, plain, p):+.2f} B" if compared else "-" for p in ("backward", "step")]
        how = f"{run['model']}, {engine_of(run)} {run['precision']}"
        how += f", accumulation {run['accumulation']}" if run["accumulation"] > 1 else ""
        cells = [how, str(run["ranks"]), run["strategy"], *gib, f"{total / 2**30:.2f}", *extra]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def extra_bytes(run: dict[str, Any], plain: dict[str, Any], phase: str) -> float:
    """What a phase of ``run`` takes at its highest point above that of ``plain``, for a parameter of a rank's share."""
    return (peak(run, phase) - peak(plain, phase)) * run["ranks"] / run["parameters"]


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a benchmark's docstring."""
    described, epilog = (doc or "").split("\n\n", 1)
    return argparse.ArgumentParser(
        description=described, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = command_line(__doc__)
    made.add_argument("--model", choices=sorted(MODELS), default="roberta-large", help="size; always random weights")
    made.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="numbers of processes to try"
    )
    made.add_argument(
        "--strategy",
        choices=STRATEGIES,
        nargs="+",
        default=["none", "second", "ensemble"],
        help='"none" is AdamW, what the others are compared with',
    )
    made.add_argument(
        "--engine", choices=("zero", "fsdp1", "fsdp2"), default="zero", help="zero: DeepSpeed, see --stage"
    )
    made.add_argument("--stage", type=int, choices=range(4), default=3, help="ZeRO stage")
    made.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    made.add_argument("--batch", type=int, default=1, metavar="N", help="sentences to a micro-batch and rank")
    made.add_argument("--accumulation", type=int, default=1, metavar="N", help="micro-batches to a step")
    made.add_argument("--steps", type=int, default=2, metavar="N", help="optimizer steps; the highest peak counts")
    made.add_argument("--output", type=Path, default=RESULTS, help="results file (default: %(default)s)")
    made.add_argument("--force", action="store_true", help="measure again what the file has")
    made.add_argument("--timeout", type=float, default=1800, metavar="S", help="seconds for one combination")
    made.add_argument("--table", action="store_true", help="print the file's results as a table, measure nothing")
    made.add_argument("--rank-of", type=json.loads, help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Measure what is missing, then print the table."""
    options = parser().parse_args()
    if options.rank_of is not None:
        options.output.write_text(json.dumps(measure(options.rank_of)))
        return
    if min(options.ranks, default=0) < 1 or min(options.batch, options.accumulation, options.steps) < 1:
        raise SystemExit("--ranks, --batch, --accumulation and --steps must be 1 or more")
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("this measurement needs Linux: it reads and resets the kernel's high-water mark of a process")
    results = read(options.output)
    jobs = [] if options.table else list(itertools.product(options.ranks, options.strategy))
    for i, (ranks, strategy) in enumerate(jobs, 1):
        same = ("model", "engine", "stage", "precision", "batch", "accumulation", "steps")
        job = {**{name: getattr(options, name) for name in same}, "ranks": ranks, "strategy": strategy}
        known = key_of(job) in results["runs"] and not options.force
        print(f"[{i}/{len(jobs)}] {key_of(job)}{': in the file' if known else ''}", file=sys.stderr, flush=True)
        if known:
            continue
        run = run_job(job, options.timeout)
        run["command"] = "python benchmarks/memory.py " + " ".join(
            f"--{name} {job[name]}" for name in (*same, "ranks", "strategy")
        )
        results["runs"][key_of(job)] = run
        write(options.output, results)
    print(table(results))


if __name__ == "__main__":
    main()
