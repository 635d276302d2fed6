"""Whether a decoder of a billion parameters takes ROSE steps under ZeRO-3 in bf16 on two CPU ranks, in how much memory.

    python benchmarks/billion.py                       # 1.004 billion parameters, 20 GiB of free memory
    python benchmarks/billion.py --layers 2            # the same in small

A Llama with random weights under ``deepspeed.zero.Init``, one row of random tokens a rank, labels at its second half.
Each rank reports the kernel's high-water mark of its resident memory, and the whole result goes to a JSON file. The
ranks are the first that Linux kills where memory runs out, and are stopped before it does.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from memory import _free_port, command_line, read, write

from rose_ds.experiments.cost.memory import MALLOC, status

RESULTS = Path(__file__).parent / "results" / "billion.json"
SHAPE = dict(hidden_size=1792, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=14, vocab_size=8000)
LENGTH = 16
_LEFT = 1.5 * 2**30  # bytes of free memory below which the ranks are stopped


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """A DeepSpeed config that keeps little beside the partitions: fp32 gradients of one sub-group at a time."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "RoseAdamW", "params": {"lr": 1e-5, "strategy": options.strategy}},
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": options.sub_group_size,
            "reduce_bucket_size": 10_000_000,
            "stage3_prefetch_bucket_size": 1_000_000,
            "stage3_max_live_parameters": 20_000_000,
            "stage3_max_reuse_distance": 0,
        },
    }


def rank(options: argparse.Namespace) -> dict[str, Any]:
    """Train on this rank."""
    Path("/proc/self/oom_score_adj").write_text("1000")
    warnings.filterwarnings("ignore")
    import deepspeed
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

    import rose_ds
    from rose_ds.training.predictions import positions_of

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    # torch's own random weights stay: transformers' initialisation cannot see partitioned parameters
    LlamaPreTrainedModel._init_weights = lambda self, module: None
    peaks = {"imports": status()["VmHWM"]}
    config = LlamaConfig(**SHAPE, num_hidden_layers=options.layers, max_position_embeddings=64, attention_dropout=0.1)
    with deepspeed.zero.Init(config_dict_or_path=settings(options)):
        model = LlamaForCausalLM(config)
    parameters = sum(p.ds_numel for p in model.parameters())
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings(options))
    stepper = rose_ds.prepare(engine)
    engine.train()
    peaks["engine"] = status()["VmHWM"]
    torch.manual_seed(int(os.environ["RANK"]))
    steps = []
    for step in range(options.steps):
        started = time.monotonic()
        ids = torch.randint(3, SHAPE["vocab_size"], (1, LENGTH))
        labels = ids.clone()
        labels[:, : LENGTH // 2] = -100
        found: list[Any] = []

        def forward(ids: Any = ids, labels: Any = labels, found: list[Any] = found) -> Any:
            found[:] = [engine(input_ids=ids, labels=labels)]
            return found[0].logits

        values = stepper.backward(forward, lambda _, found=found: found[0].loss, positions=positions_of(labels, model))
        report = stepper.step()
        assert report is not None and not report.skipped
        row = {"loss": float(values["loss"]), "tau_first": report.tau_first, "tau_second": report.tau_second}
        steps.append({**row, "kept": report.kept_fraction, "seconds": round(time.monotonic() - started, 1)})
        peaks[f"step {step + 1}"] = status()["VmHWM"]
        print(f"rank {os.environ['RANK']}: {steps[-1]}, peak {peaks[f'step {step + 1}'] / 2**30:.2f} GiB", flush=True)
    return {"parameters": parameters, "eligible": stepper.engine.layout.element_count, "steps": steps, "peaks": peaks}


def available() -> int:
    """Bytes of memory that the system could still give away."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Start both ranks and wait.

    Raises:
        SystemExit: a rank failed, or the machine's memory ran low.
    """
    port, least, start = _free_port(), available(), available()
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for i in range(2):
            env = {**os.environ, **MALLOC, "RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": "2"}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            ranks.append(subprocess.Popen([sys.executable, *sys.argv, "--rank-output", f"{folder}/{i}.json"], env=env))
        try:
            while any(process.poll() is None for process in ranks):
                least = min(least, available())
                if any(process.poll() for process in ranks) or least < _LEFT:
                    raise SystemExit(f"stopped: {least / 2**30:.1f} GiB of memory were left of {start / 2**30:.1f}")
                time.sleep(0.1)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        found = [json.loads(Path(folder, f"{i}.json").read_text()) for i in range(2)]
    shared = {name: found[0][name] for name in ("parameters", "eligible")}
    taken = start - least
    shape = {**SHAPE, "layers": options.layers, "length": LENGTH, "strategy": options.strategy}
    return {**shape, **shared, "ranks": found, "least_available": least, "taken_of_the_machine": taken}


def main() -> None:
    """Run, print, and write the result."""
    made = command_line(__doc__)
    made.add_argument("--layers", type=int, default=25, help="39 million parameters each (default: %(default)s)")
    made.add_argument("--strategy", choices=("none", "second", "ensemble"), default="second")
    made.add_argument("--steps", type=int, default=2)
    made.add_argument("--sub_group_size", type=int, default=50_000_000, help="DeepSpeed's (default: %(default)s)")
    made.add_argument("--output", type=Path, default=RESULTS, help="results file (default: %(default)s)")
    made.add_argument("--rank-output", type=Path, help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.rank_output is not None:
        options.rank_output.write_text(json.dumps(rank(options)))
        return
    result = run(options)
    peaks = [max(each["peaks"].values()) for each in result["ranks"]]
    print(
        f"{result['parameters']:,} parameters: peaks {', '.join(f'{peak / 2**30:.2f}' for peak in peaks)} GiB, "
        f"{sum(peaks) / result['parameters']:.1f} bytes a parameter in all; "
        f"the machine had {result['least_available'] / 2**30:.1f} GiB left"
    )
    results = read(options.output)
    results["runs"][f"{options.layers} layers {options.strategy}"] = {
        **result,
        "command": f"python benchmarks/billion.py --layers {options.layers} --strategy {options.strategy}",
    }
    write(options.output, results)


if __name__ == "__main__":
    main()
