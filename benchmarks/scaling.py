"""What a step of ROSE would cost beside AdamW's at 8 to 1,024 GPUs: a model, not a measurement.

    python benchmarks/scaling.py

Passes cost what their floating-point operations cost at an assumed fraction of the peak, or what ZeRO-3's collectives
of them cost, whichever is longer (they overlap). Collectives cost a latency for each doubling of the ranks and their
bytes over the bandwidth of a rank. A threshold adds three small collectives that overlap with nothing, and reads the
local risks three times. Every constant is an argument; its default, and where it comes from, is below. What the model
leaves out: stragglers, activation checkpointing, pipeline and tensor parallelism, and the optimizer's own update, which
is the same for all.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from memory import command_line, write

RESULTS = Path(__file__).parent / "results" / "scaling.json"
#: Parameters and tokens to a GPU and step.
MODELS = {
    "RoBERTa-large, 355M": (355e6, 32 * 128),
    "encoder, 1.5B": (1.5e9, 16 * 512),
    "decoder, 7B": (7e9, 4 * 2048),
}
RANKS = (8, 64, 256, 1024)


@dataclass(frozen=True)
class Machine:
    """Assumed constants."""

    flops: float = 990e12
    """bf16 peak of an H100 SXM, dense, from its data sheet."""
    efficiency: float = 0.4
    """Of the peak that passes reach: what well-tuned training reports."""
    bandwidth: float = 40e9
    """Bytes a second that a rank moves in a ring over a node's links and 400 Gbit/s adapters."""
    latency: float = 15e-6
    """Seconds for each doubling of the ranks."""
    memory: float = 2.5e12
    """Bytes a second from the GPU's memory, three quarters of the data sheet's."""
    eligible: float = 0.85
    """Of the parameters: what the default patterns select in a RoBERTa."""


#: Bytes of the three histograms of a threshold, as core/threshold.py exchanges them: counts of 8 bytes.
HISTOGRAMS = tuple(8 * 2**width for width in (12, 10, 10))


def collective(m: Machine, ranks: int, received: float) -> float:
    """Seconds of a ring collective that leaves ``received`` bytes on each rank."""
    return m.latency * math.log2(ranks) + received * (ranks - 1) / ranks / m.bandwidth


def passes(m: Machine, parameters: float, tokens: float, ranks: int, forward: float, backward: float) -> float:
    """Seconds of so many forward and backward passes, parts of a batch as fractions."""
    work = 2 * parameters * tokens / (m.flops * m.efficiency)
    whole = collective(m, ranks, 2 * parameters)  # bf16 parameters gathered; gradients scattered as fast
    there = max(work * forward, whole * math.ceil(forward))
    back = max(2 * work * backward, 2 * whole * math.ceil(backward))
    return there + back


def threshold(m: Machine, parameters: float, ranks: int) -> tuple[float, float]:
    """Seconds of the exchanges, by all-gather or all-reduce, whichever is shorter, and of reading the risks."""
    exchanges = sum(min(collective(m, ranks, size * ranks), 2 * collective(m, ranks, size)) for size in HISTOGRAMS)
    return exchanges, 3 * 4 * m.eligible * parameters / ranks / m.memory


#: Method -> forward passes, backward passes, thresholds. Halves are of steps of two micro-batches or more, and one is
#: counted here: thresholds weigh less there.
METHODS = {
    "second": (1.0, 1.0, 1),
    "ensemble": (3.0, 3.0, 2),  # ZeRO-3 runs the first pass again
    "ensemble, fast": (1.25, 1.25, 2),
    "ensemble, halves": (1.0, 1.0, 2),
}


def modelled(m: Machine) -> dict[str, dict[str, dict[str, float]]]:
    """By model and ranks: seconds of an AdamW step's passes, each method's ratio to it, and what its thresholds add."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for model, (parameters, tokens) in MODELS.items():
        for ranks in RANKS:
            plain = passes(m, parameters, tokens, ranks, 1, 1)
            exchanges, reading = threshold(m, parameters, ranks)
            row = {"AdamW (s)": plain, "a threshold's exchanges (ms)": 1e3 * exchanges}
            for method, (forward, backward, thresholds) in METHODS.items():
                # the fast risk's quarter of a batch gathers the parameters as a whole batch does
                extra = passes(m, parameters, tokens, ranks, forward - 1, backward - 1) if forward > 1 else 0.0
                row[method] = (plain + extra + thresholds * (exchanges + reading)) / plain
            found.setdefault(model, {})[str(ranks)] = row
    return found


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown."""
    columns = list(next(iter(next(iter(results.values())).values())))
    lines = ["| model | GPUs | " + " | ".join(columns) + " |", "|" + " --- |" * (len(columns) + 2)]
    for model, by_ranks in results.items():
        for ranks, row in by_ranks.items():
            lines.append(f"| {model} | {ranks} | " + " | ".join(f"{row[c]:.3g}" for c in columns) + " |")
    return "\n".join(lines)


def main() -> None:
    """Compute, write, print."""
    parser = command_line(__doc__)
    for name, value in asdict(Machine()).items():
        parser.add_argument(f"--{name}", type=float, default=value, help="default: %(default)g")
    parser.add_argument("--output", type=Path, default=RESULTS, help="results file (default: %(default)s)")
    options = parser.parse_args()
    machine = Machine(**{name: getattr(options, name) for name in asdict(Machine())})
    results = modelled(machine)
    write(options.output, {"assumptions": asdict(machine), "models": results})
    print(json.dumps(asdict(machine)))
    print(table(results))


if __name__ == "__main__":
    main()
