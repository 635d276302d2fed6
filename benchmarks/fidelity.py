"""How well a fast first-order mask agrees with an exact one, beside how well two exact ones agree with each other.

    python benchmarks/fidelity.py --model minilm --stages 0 100 300

A model is fine-tuned with AdamW on real sentences; at each stage first-order risk is found for the same batches in
several ways, each with dropout masks of its own, and the lowest are kept. The table has the fraction of the elements
(tensors) on which two masks agree. Two draws of dropout give two exact masks: their agreement is the noise floor, which
an estimate has to reach, less 0.01. Beside it, each way's agreement with the mask of the risk averaged over many exact
draws, which is nearer to what Eq. 2 means; and the agreement of two averages over steps (risk_ema).

"Spread over N ranks" is a risk that needs no second pass: the standard deviation of the task gradients that N ranks
find for their own rows of the batch, each with its dropout. Over two it is what first_order="halves" ranks, which finds
it from the two halves of a step's micro-batches; over more it is tried here alone.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from memory import command_line, origin, write
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "fidelity.json"
DRAWS = 12
"""Exact draws that an averaged risk is made of."""


class Study:
    """A model, its batches, and the risks of its eligible parameters."""

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import set_seed

        from rose_ds.data import get_task, load_task, padding_collator, tokenize
        from rose_ds.experiments.models import load_tokenizer

        set_seed(0)
        self.keep = options.keep
        spec = get_task("snippets")
        tokenizer, data = load_tokenizer("minilm"), load_task("snippets", splits=("train",))
        assert data.train is not None
        rows = tokenize(data.train.shuffle(0).select(range(options.batch * 64)), spec, tokenizer, 64)
        collate = padding_collator(tokenizer)
        self.batches = [
            collate([rows[j] for j in range(i, i + options.batch)]) for i in range(0, len(rows), options.batch)
        ]
        self.model = model_of(options, spec).train()

    def train(self, steps: int, lr: float) -> None:
        """AdamW on batches that come round again."""
        from rose_ds import RoseAdamW, prepare

        optimizer = RoseAdamW(self.model.named_parameters(), lr=lr, strategy="none")
        stepper = prepare(self.model, optimizer, max_grad_norm=1.0)
        for batch in itertools.islice(itertools.cycle(self.batches[8:]), steps):
            stepper.backward(*closures(self.model, batch))
            stepper.step()

    def risks(self, batch: dict[str, Tensor], **settings: Any) -> list[Tensor]:
        """|KL gradient| of each eligible tensor for one batch and one draw of dropout."""
        from rose_ds import RoseAdamW, Sample, prepare, sample_rows

        optimizer = RoseAdamW(self.model.named_parameters(), strategy="first", **settings)
        stepper = prepare(self.model, optimizer)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        some, rows = sample_rows(inputs, stepper.config.risk_rows)
        stepper.backward(*closures(self.model, batch), sample=Sample(lambda: self.model(**some).logits, rows))
        grads = stepper.engine.take_risk_grads()
        assert grads is not None
        self.model.zero_grad(set_to_none=True)
        return [g.abs() for g in grads]

    def spread(self, batch: dict[str, Tensor], ranks: int) -> list[Tensor]:
        """Standard deviation of the ranks' task gradients, of each eligible tensor."""
        from rose_ds.config import RoseConfig
        from rose_ds.eligible import eligible_names

        named = dict(self.model.named_parameters())
        names = eligible_names(RoseConfig(), {name: p.shape for name, p in named.items()})
        parameters = [named[name] for name in names]
        sums, squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
        rows = len(batch["labels"]) // ranks
        for rank in range(ranks):
            forward, loss = closures(self.model, {k: v[rank * rows : (rank + 1) * rows] for k, v in batch.items()})
            for g, s, q in zip(torch.autograd.grad(loss(forward()), parameters), sums, squares, strict=True):
                s.add_(g), q.addcmul_(g, g)
        moments = zip(sums, squares, strict=True)
        return [(q / ranks - (s / ranks).square()).clamp_(min=0).sqrt().flatten() for s, q in moments]

    def mask(self, risks: list[Tensor], granularity: str) -> Tensor:
        """Where the lowest are kept, 1-D bool."""
        from rose_ds.core.mask import keep_count

        every = torch.cat(risks) if granularity == "element" else torch.stack([r.norm() for r in risks])
        return every <= every.kthvalue(keep_count(self.keep, every.numel())).values

    def agreements(self) -> dict[str, dict[str, float]]:
        """By granularity and pair of ways, the mean over batches."""
        ways: dict[str, dict[str, Any]] = {
            "fast, all rows": {"first_order": "fast", "risk_rows": 1.0},
            "fast, half of the rows": {"first_order": "fast", "risk_rows": 0.5},
            "fast, a quarter of the rows": {"first_order": "fast"},
        }
        found: dict[str, dict[str, list[float]]] = {"element": {}, "tensor": {}}
        for batch in self.batches[:3]:
            # sums of many draws: a mask is that of their mean
            draws, averaged, halves = [], list[Tensor](), [list[Tensor](), list[Tensor]()]
            for i in range(DRAWS + 2):
                risks = self.risks(batch)
                halves[i % 2] = added(halves[i % 2], risks)
                if i < 2:
                    draws.append(risks)
                else:
                    averaged = added(averaged, risks)
            tried = {name: self.risks(batch, **settings) for name, settings in ways.items()}
            sizes = [n for n in (2, 4, 16) if n <= len(batch["labels"])]
            tried |= {f"spread over {n} ranks": self.spread(batch, n) for n in sizes}
            for granularity, into in found.items():
                exact, other, mean = (self.mask(r, granularity) for r in (draws[0], draws[1], averaged))
                pairs = {"exact ~ exact": (exact, other), "exact ~ averaged": (exact, mean)}
                for name, risks in tried.items():
                    pairs[f"{name} ~ exact"] = (self.mask(risks, granularity), exact)
                    pairs[f"{name} ~ averaged"] = (self.mask(risks, granularity), mean)
                a, b = (self.mask(half, granularity) for half in halves)
                pairs[f"averages of {DRAWS // 2 + 1} draws, with each other"] = (a, b)
                for name, (one, two) in pairs.items():
                    into.setdefault(name, []).append(float((one == two).float().mean()))
        return {g: {name: statistics.mean(values) for name, values in into.items()} for g, into in found.items()}


def added(sums: list[Tensor], risks: list[Tensor]) -> list[Tensor]:
    """Sums with one draw more."""
    return [s + r for s, r in zip(sums, risks, strict=True)] if sums else risks


def model_of(options: argparse.Namespace, spec: Any) -> Any:
    """``minilm``, or a BERT of random weights by its number of layers and width, e.g. 12x768."""
    from transformers import BertConfig, BertForSequenceClassification

    from rose_ds.experiments.models import load_model

    layers, _, width = options.model.partition("x")
    if not (layers.isdigit() and width.isdigit()):
        return load_model(options.model, spec)
    heads = int(width) // 64
    shape = {"num_hidden_layers": int(layers), "hidden_size": int(width), "num_attention_heads": heads}
    return BertForSequenceClassification(BertConfig(**shape, intermediate_size=4 * int(width), num_labels=2))


def closures(model: Any, batch: dict[str, Tensor]) -> tuple[Any, Any]:
    """Forward pass and loss of a batch."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return lambda: model(**inputs).logits, lambda logits: torch.nn.functional.cross_entropy(logits, batch["labels"])


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each pair, a column for each stage."""
    lines = []
    for granularity in ("element", "tensor"):
        stages = results["stages"]
        lines += [
            f"| {granularity} | " + " | ".join(f"step {s}" for s in stages) + " |",
            "| --- |" + " --- |" * len(stages),
        ]
        names = next(iter(stages.values()))[granularity]
        lines += [
            f"| {name} | " + " | ".join(f"{stage[granularity][name]:.3f}" for stage in stages.values()) + " |"
            for name in names
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure, add to the results file, print the table."""
    parser = command_line(__doc__)
    parser.add_argument("--model", default="minilm", help="minilm, a folder, or LAYERSxWIDTH of random weights")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="sentences to a batch (default: 32)")
    parser.add_argument(
        "--stages", type=int, nargs="+", default=[0, 100, 300], metavar="N", help="steps trained before"
    )
    parser.add_argument("--keep", type=float, default=0.6, metavar="F", help="fraction kept (default: 0.6)")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate (default: 1e-4)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="results file (default: %(default)s)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    from tqdm import tqdm
    from transformers import logging

    logging.set_verbosity_error()
    settings = {name: getattr(options, name) for name in ("model", "batch", "keep", "lr")}
    flags = " ".join(f"--{name} {value}" for name, value in settings.items())
    study, done = Study(options), 0
    results: dict[str, Any] = {
        **origin(f"python benchmarks/fidelity.py {flags} --stages {' '.join(map(str, options.stages))}"),
        "parameters": study.model.num_parameters(),
        "stages": {},
    }
    for stage in tqdm(sorted(options.stages), desc="stages"):
        study.train(stage - done, options.lr)
        done = stage
        results["stages"][str(stage)] = study.agreements()
        write(options.output, results)  # after each: a large model takes hours
    print(table(results))


if __name__ == "__main__":
    main()
