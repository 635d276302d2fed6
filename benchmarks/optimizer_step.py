"""What an optimizer step costs beside AdamW's: thresholds, masks and update, on tensors of random numbers.

    python benchmarks/optimizer_step.py --elements 22000000 --threads 2
    python benchmarks/optimizer_step.py --elements 124000000 --fast_alone --output FILE

All rows take turns in every round and in a new order, so that a busy moment of the machine meets all alike, and all
update the same parameters and moments, so that none has the better pages: a round's seconds are divided by those of
torch.optim.AdamW(fused=True) in it, and the table has the median of these ratios and their quartiles. The host's
bandwidth is that of the fused AdamW, which moves 28 bytes an element and is bound by memory. Masks are by element and
keep 0.6; every parameter is eligible.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import command_line, compared, origin, write

RESULTS = Path(__file__).parent / "results" / "optimizer_step.json"
STRATEGIES = ("none", "first", "second", "ensemble")
FUSED = "torch AdamW, fused"
_TURNS, _APART = 3, 16
BYTES = 28
"""An element: AdamW reads four numbers of four bytes and writes three."""


class Case:
    """Parameters with moments and gradients, and a second gradient to rank; every row's optimizer holds the same."""

    def __init__(self, elements: int, slices: int, dtype: torch.dtype) -> None:
        sizes = [elements // slices] * slices
        self.params = [torch.randn(n) for n in sizes]
        self.moments = [(torch.randn(n) * 1e-3, torch.rand(n) * 1e-6) for n in sizes]
        self.risks = [torch.randn(n) * 1e-4 for n in sizes]
        # in turns: of one gradient again and again, every second-order risk would be the same
        room = [(torch.randn(n + _TURNS * _APART) * 1e-3).to(dtype) for n in sizes]
        self.turns = [[r[i * _APART :][:n] for r, n in zip(room, sizes, strict=True)] for i in range(_TURNS)]
        self.full = [g.float() for g in self.turns[0]]

    def held(self) -> list[torch.nn.Parameter]:
        """The parameters, with an fp32 gradient, or one of another type later."""
        params = [torch.nn.Parameter(p) for p in self.params]
        for param, grad in zip(params, self.full, strict=True):
            param.grad_dtype = None
            param.grad = grad
        return params

    def share(self, optimizer: torch.optim.Optimizer, step: Any) -> None:
        """Give it the moments, and a count of steps that is no small number."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for param, (first, second) in zip(params, self.moments, strict=True):
            optimizer.state[param] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
            step = step.clone() if isinstance(step, torch.Tensor) else step

    def rose(self, strategy: str, kernels: Any | None, granularity: str = "element") -> Callable[[], None]:
        """A step of RoseAdamW as a stepper takes it: masks from the gradients, then the update."""
        from rose_ds import RoseAdamW
        from rose_ds.core.layout import Block, Layout
        from rose_ds.core.magnitudes import StepInputs
        from rose_ds.core.select import select
        from rose_ds.core.threshold import local_only
        from rose_ds.masks import policy_of
        from rose_ds.optimizer import Plan, Slice

        named = [(f"t{i}", p) for i, p in enumerate(self.held())]
        optimizer = RoseAdamW(named, lr=1e-4, strategy=strategy)
        optimizer.kernels = kernels
        self.share(optimizer, torch.tensor(100.0))
        params = [p for _, p in named]
        blocks = [Block.flat(p.numel(), 0, p.numel()) for p in params]
        optimizer.attach(
            [Slice(n, i, p, 0, p.numel(), b) for i, ((n, p), b) in enumerate(zip(named, blocks, strict=True))]
        )
        count = len(params)
        layout = Layout(
            list(range(count)), [local_only] * count, [local_only], count, sum(b.numel for b in blocks),
            [n for n, _ in named], blocks,
        )  # fmt: skip
        policy = policy_of(optimizer.config)
        turns = itertools.cycle(self.turns)
        used: list[Any] = []

        def step() -> None:
            grads = next(turns)
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            if policy is None:
                optimizer.step()
                return
            moments = [optimizer.init_state(p)["exp_avg"] for p in params]
            inputs = StepInputs(layout, grads, moments, params, [0.9] * count, risk_grads=self.risks)
            selection = select(policy.selectors, granularity, inputs, kernels, used=used)
            used[:] = selection.codes if kernels is not None and granularity == "element" else []
            optimizer.plan = Plan(selection.codes, values=policy.values, rule=policy.rule)
            optimizer.step()

        return step

    @torch.no_grad()
    def authors(self) -> None:
        """A step of what the method's published code does, restated: Frobenius norms of both risks, quantiles of them
        over the tensors, and AdamW by a loop over all tensors, whatever their mask.
        """
        grads, lr, beta1, beta2 = self.turns[0], 1e-4, 0.9, 0.999
        first = torch.stack([risk.norm() for risk in self.risks])
        moments = [m.norm() for m, _ in self.moments]
        second = torch.stack([(0.1 * g.norm() / m - 1).abs() for g, m in zip(grads, moments, strict=True)])
        masks = 0.5 * (first <= first.quantile(0.6)).float() + 0.5 * (second <= second.quantile(0.6)).float()
        for p, g, (m, v), mask in zip(self.params, grads, self.moments, masks, strict=True):
            used = mask * g + (1 - mask) * m
            m.mul_(beta1).add_(used, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(used, used, value=1 - beta2)
            p.addcdiv_(m * mask, v.sqrt().add_(1e-8), value=-lr)
            p.add_(p * mask, alpha=-lr * 0.01)

    def adamw(self, **how: Any) -> Callable[[], None]:
        """torch's."""
        optimizer = torch.optim.AdamW(self.held(), lr=1e-4, **how)
        self.share(optimizer, torch.tensor(100.0))
        return optimizer.step

    def deepspeed(self) -> Callable[[], None] | None:
        """DeepSpeed's for offload; None where it cannot be built."""
        try:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            optimizer = DeepSpeedCPUAdam(self.held(), lr=1e-4, weight_decay=0.01)
        except Exception as error:  # whatever its builder raises
            print(f"DeepSpeedCPUAdam is left out: {error}")
            return None
        self.share(optimizer, 100)
        return optimizer.step

    def thresholds(self, kernels: Any) -> dict[str, Callable[[], Any]]:
        """One exact threshold of first-order risk."""
        from rose_ds.core.threshold import kth_smallest, local_only

        count = sum(r.numel() for r in self.risks)
        every = torch.cat(self.risks).abs()
        k = int(0.6 * count)
        return {
            "threshold, kernels": lambda: kth_smallest([(kernels.Risks(grads=self.risks), local_only)], k, count=count),
            "threshold, torch": lambda: kth_smallest([([every], local_only)], k, count=count),
            "torch.kthvalue": lambda: every.kthvalue(k).values,
        }


def rows_of(case: Case, kernels: Any | None, others: bool, everything: bool) -> dict[str, Callable[[], Any]]:
    """What is measured, by its name: the ``others`` too, and ``everything`` that is slow."""
    rows: dict[str, Callable[[], Any]] = {FUSED: case.adamw(fused=True)}
    if others and (offloaded := case.deepspeed()) is not None:
        rows["DeepSpeedCPUAdam"] = offloaded
    if others:  # what a pass over four bytes an element costs that computes next to nothing
        rows["the risks read once, by torch.sum"] = lambda: [risk.sum() for risk in case.risks]
    if everything:
        rows |= {"torch AdamW": case.adamw(foreach=False), "torch AdamW, foreach": case.adamw(foreach=True)}
    for strategy in STRATEGIES:
        rows |= {f"{strategy}, kernels": case.rose(strategy, kernels)} if kernels else {}
        rows |= {f"{strategy}, torch": case.rose(strategy, None)} if everything else {}
    if len(case.params) > 1 and case.turns[0][0].dtype == torch.float32:
        rows["the authors' rule (ensemble, by tensor), restated"] = case.authors
        if kernels:
            for strategy in STRATEGIES[1:]:
                rows[f"{strategy} by tensor, kernels"] = case.rose(strategy, kernels, "tensor")
    if kernels and everything:
        rows |= case.thresholds(kernels)
    return rows


def measured(rows: dict[str, Callable[[], Any]], rounds: int, warmup: int, seconds: float) -> dict[str, dict[str, Any]]:
    """By row: seconds, ratio to the fused AdamW, quartiles. One that takes longer than ``seconds`` runs three times."""
    from tqdm import tqdm

    found: dict[str, list[float]] = {name: [] for name in rows}
    base: dict[str, list[float]] = {name: [] for name in rows}
    slow: set[str] = set()
    for turn in tqdm(range(warmup + rounds), desc="rounds"):
        took = {}
        for name in random.sample(list(rows), len(rows)):
            if name in slow - {FUSED} and len(found[name]) >= 3:
                continue
            started = time.perf_counter()
            rows[name]()
            took[name] = time.perf_counter() - started
            if turn >= warmup and took[name] > seconds:  # before, memory is touched for the first time
                slow.add(name)
        if turn >= warmup:
            for name, value in took.items():
                found[name].append(value)
                base[name].append(took[FUSED])
    return {name: compared(took, base[name]) for name, took in found.items()}


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| case | row | ratio to fused AdamW | quartiles |", "| --- | --- | --- | --- |"]
    for case, found in results["cases"].items():
        for name, row in found["rows"].items():
            low, high = row["ratio_quartiles"]
            lines.append(f"| {case} | {name} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} |")
        lines.append(f"| {case} | fused AdamW's bandwidth | {found['bandwidth'] / 1e9:.0f} GB/s | |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write the results, print the table."""
    parser = command_line(__doc__)
    parser.add_argument(
        "--elements", type=int, default=22_000_000, metavar="N", help="parameters (default: 22 million)"
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="that count (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="that do not (default: %(default)s)")
    parser.add_argument(
        "--fast_alone",
        action="store_true",
        help="without what takes ten times as long and memory of its own: torch's loops and foreach",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="results file (default: %(default)s)")
    options = parser.parse_args()
    from rose_ds.kernels import build

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kernels = build.extension()
    cases: dict[str, tuple[int, torch.dtype]] = {
        "one slice, fp32": (1, torch.float32),
        "600 slices, fp32": (600, torch.float32),
        "one slice, bf16 gradients": (1, torch.bfloat16),
    }
    found = {}
    for name, (slices, dtype) in cases.items():
        print(name)
        case, first = Case(options.elements, slices, dtype), name == next(iter(cases))
        rows_here = rows_of(case, kernels, others=first, everything=first and not options.fast_alone)
        rows = measured(rows_here, options.rounds, options.warmup, 1.0)
        del case, rows_here  # before the next one's are there
        found[name] = {"rows": rows, "bandwidth": BYTES * options.elements / rows[FUSED]["seconds"]}
    command = (
        f"python benchmarks/optimizer_step.py --elements {options.elements} --threads {options.threads} "
        f"--rounds {options.rounds}" + " --fast_alone" * options.fast_alone
    )
    results = {**origin(command), "cores": os.cpu_count(), "cases": found}
    write(options.output, results)
    print(table(results))


if __name__ == "__main__":
    main()
