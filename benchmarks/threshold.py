"""One exact global threshold, by exchanged histograms and by ways that need no code: time, bytes and collectives.

    python benchmarks/threshold.py --elements 8000000 --ranks 1 2 4 8

The same random numbers, spread evenly over gloo ranks of this machine, one thread each. All ways take turns in every
round and in a new order; a round's seconds are the slowest rank's, and are divided by those of "histograms, kernels" in
it. Every outcome is compared, bit for bit. More ranks than cores wait for each other: look at one column at a time.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from memory import command_line, compared, origin, write
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "threshold.json"
OURS = "histograms, kernels"
KEEP = 0.6


class Wire:
    """rose_ds's exchange, with what a rank receives: bytes, and in how many collectives."""

    def __init__(self) -> None:
        from rose_ds.exchange import GroupExchange

        self.exchange = GroupExchange(None, torch.device("cpu"), "all_gather")
        self.bytes = self.collectives = 0

    def __call__(self, local: Tensor) -> Tensor:
        self.bytes += local.nbytes * (self.exchange.world_size - 1)
        self.collectives += 1
        return self.exchange(local)


def ways_of(mine: Tensor, count: int, kernels: Any | None, wire: Wire) -> dict[str, Callable[[], Tensor | float]]:
    """Name -> the k-th smallest of all ranks' values."""
    from rose_ds.core.threshold import kth_smallest

    k = int(KEEP * count)

    def gathered() -> Tensor:
        return wire(mine).flatten()

    ways: dict[str, Callable[[], Tensor | float]] = {
        "histograms, torch": lambda: kth_smallest([([mine], wire)], k, count=count).value,
        "gather, kthvalue": lambda: gathered().kthvalue(k).values,
        "gather, sort": lambda: gathered().sort().values[k - 1],
    }
    if kernels is not None:
        ways[OURS] = lambda: kth_smallest([(kernels.Risks(grads=[mine]), wire)], k, count=count).value
    return ways


def run(rank: int, ranks: int, elements: int, rounds: int, folder: str) -> None:
    """One rank; the first one writes what was found."""
    from rose_ds.kernels import build

    meeting = f"file://{folder}/store"
    dist.init_process_group("gloo", meeting, rank=rank, world_size=ranks, timeout=timedelta(seconds=300))
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    mine, wire = torch.randn(elements // ranks).abs(), Wire()
    ways = ways_of(mine, elements // ranks * ranks, build.extension(), wire)
    found: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(0)
    for turn in range(rounds + 1):  # the first one is not counted
        for name in order.sample(list(ways), len(ways)):
            wire.bytes = wire.collectives = 0
            dist.barrier()
            started = time.perf_counter()
            value = float(ways[name]())
            slowest = torch.tensor(time.perf_counter() - started)
            found[name] = {"value": value, "bytes": wire.bytes, "collectives": wire.collectives}
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if turn:
                seconds[name].append(float(slowest))
    assert len({each["value"] for each in found.values()}) == 1, found
    if rank == 0:
        base = seconds[OURS] if OURS in ways else seconds["histograms, torch"]
        for name, took in seconds.items():
            found[name] |= compared(took, base)
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def measured(ranks: int, elements: int, rounds: int) -> dict[str, Any]:
    """By way, on so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (ranks, elements, rounds, folder), nprocs=ranks)
        found: dict[str, Any] = torch.load(Path(folder) / "found.pt")
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each way and number of ranks."""
    lines = ["| ranks | way | seconds | quartiles | received by a rank | collectives |", "|" + " --- |" * 6]
    for ranks, found in results["ranks"].items():
        for name, row in found.items():
            low, high = row["ratio_quartiles"]
            size = f"{row['bytes'] / 1e6:.2f} MB"
            lines.append(
                f"| {ranks} | {name} | {row['ratio']:.1f} | {low:.1f} to {high:.1f} | {size} | {row['collectives']} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure, write the results, print the table."""
    parser = command_line(__doc__)
    parser.add_argument(
        "--elements", type=int, default=8_000_000, metavar="N", help="over all ranks (default: 8 million)"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="default: 1 2 4 8")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="that count (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="results file (default: %(default)s)")
    options = parser.parse_args()
    from tqdm import tqdm

    from rose_ds.kernels import build

    build.extension()  # once, before several ranks want it
    found = {
        str(n): measured(n, options.elements, options.rounds) for n in tqdm(options.ranks, desc="numbers of ranks")
    }
    command = (
        f"python benchmarks/threshold.py --elements {options.elements} --ranks {' '.join(map(str, options.ranks))} "
        f"--rounds {options.rounds}"
    )
    results = {**origin(command), "cores": os.cpu_count(), "ranks": found}
    write(options.output, results)
    print(table(results))


if __name__ == "__main__":
    main()
