"""What bf16 does to ROSE's masks: how many elements change sides against fp32 on the same step, and how many risks tie.

    python benchmarks/rounding.py --model minilm --task snippets --output benchmarks/results/rounding.json

Trains a few fp32 steps, so that there is a momentum. Then the next step's two gradients are taken several times with
the same weights, sentences and dropout masks: in fp32; in fp32 and then rounded to bf16 (an exact pass that is
communicated in bf16); under torch.autocast (weights and gradients fp32, activations bf16); with bf16 weights (DeepSpeed
and FSDP: every gradient arrives in bf16). Risks are always computed in fp32 from what arrives. "other dropout" is fp32
with another draw of the dropout masks: the noise that a mask has anyway.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from memory import origin, write
from torch import Tensor, nn

from rose_ds import RoseAdamW, RoseConfig, prepare, symmetric_kl
from rose_ds.core.mask import keep_count
from rose_ds.core.risk import first_order_risk, second_order_risk
from rose_ds.data import load_task
from rose_ds.data.tasks import TASKS
from rose_ds.experiments.models import load_model, load_tokenizer, resolve

F_dropout = F.dropout


def same_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """torch's dropout with masks that do not depend on the type of ``x``."""
    return x * F_dropout(torch.ones(x.shape), p, True).to(x.dtype) if training and p else x


def gradients(model: nn.Module, batch: dict[str, Tensor], labels: Tensor, seed: int, autocast: bool) -> Any:
    """KL and task gradient of one batch, by name."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        first, second = (model(**batch).logits for _ in range(2))
    found = []
    for loss in (symmetric_kl(first, second), F.cross_entropy(first.float(), labels)):
        grads = torch.autograd.grad(
            loss, list(named.values()), retain_graph=True, materialize_grads=True, allow_unused=True
        )
        found.append(dict(zip(named, grads, strict=True)))
    return found


def kept(risk: Tensor, keep: float) -> tuple[Tensor, int, int, float]:
    """Mask, k, how many risks equal tau, tau."""
    k = keep_count(keep, risk.numel())
    tau = risk.kthvalue(k).values
    return risk <= tau, k, int((risk == tau).sum()), tau.item()


def main() -> None:
    """Measure, print a Markdown table."""
    described, epilog = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=described, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="minilm", help="as for rose-ds train")
    parser.add_argument("--task", default="snippets", help="as for rose-ds train")
    parser.add_argument("--steps", type=int, default=10, help="fp32 steps before the comparison")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--keep", type=float, default=0.6, help="keep_first and keep_second")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()

    F.dropout = same_dropout  # type: ignore[assignment]
    torch.manual_seed(0)
    spec = TASKS[options.task]
    data = load_task(options.task, splits=("train",)).train
    folder = resolve(options.model)
    tokenizer, model = load_tokenizer(folder), load_model(folder, spec)
    model.config._attn_implementation = "eager"  # the fused one draws its own dropout
    model.float().train()

    def batch_of(step: int) -> tuple[dict[str, Tensor], Tensor]:
        rows = data.select(range(step * options.batch, (step + 1) * options.batch))
        tokens = tokenizer(
            *(list(rows[field]) for field in spec.fields),
            padding=True,
            truncation=True,
            max_length=128,
            return_tensors="pt",
        )
        return dict(tokens), torch.tensor(rows["label"])

    optimizer = RoseAdamW(model.named_parameters(), lr=5e-5, keep_first=options.keep, keep_second=options.keep)
    stepper = prepare(model, optimizer, max_grad_norm=1.0)
    for step in range(options.steps):
        batch, labels = batch_of(step)
        stepper.backward(lambda b=batch: model(**b).logits, lambda z, y=labels: F.cross_entropy(z, y))
        stepper.step()

    names = RoseConfig().eligible([n for n, p in model.named_parameters() if p.requires_grad])
    moments = torch.cat([optimizer.state[dict(model.named_parameters())[n]]["exp_avg"].flatten() for n in names])
    batch, labels = batch_of(options.steps)
    half = copy.deepcopy(model).bfloat16()
    takes = {
        "fp32": gradients(model, batch, labels, 1, False),
        "rounded to bf16": None,
        "autocast bf16": gradients(model, batch, labels, 1, True),
        "bf16 weights": gradients(half, batch, labels, 1, False),
        "other dropout": gradients(model, batch, labels, 2, False),
    }
    takes["rounded to bf16"] = [{n: g.bfloat16() for n, g in grads.items()} for grads in takes["fp32"]]
    print(f"{options.model}, {options.task}: {moments.numel():,} eligible elements, keep {options.keep}\n")
    print("| gradients | mask | other than fp32's | tau | ties at tau | kept beyond k |")
    print("| --- | --- | --- | --- | --- | --- |")
    exact: dict[str, Tensor] = {}
    rows = []
    for how, (kl, task) in takes.items():
        norm = torch.stack([g.float().norm() for g in task.values()]).norm()
        clip = min(1.0, 1.0 / (norm.item() + 1e-6))
        g = torch.cat([task[n].flatten().float() for n in names]) * clip
        risks = {
            "first": first_order_risk(torch.cat([kl[n].flatten() for n in names])),
            "second": second_order_risk(g, moments, 0.9),
        }
        for order, risk in risks.items():
            mask, k, ties, tau = kept(risk, options.keep)
            other = (mask != exact.setdefault(order, mask)).float().mean().item()
            beyond = int(mask.sum()) - k
            rows.append({"gradients": how, "mask": order, "other": other, "tau": tau, "ties": ties, "beyond": beyond})
            print(f"| {how} | {order} | {other:.2%} | {tau:.4g} | {ties} | {beyond} |")
    if options.output is not None:
        flags = ("model", "task", "steps", "batch", "keep")
        settings = " ".join(f"--{name} {getattr(options, name)}" for name in flags)
        told = origin(f"python benchmarks/rounding.py {settings}")
        write(options.output, {**told, "eligible": moments.numel(), "rows": rows})


if __name__ == "__main__":
    main()
