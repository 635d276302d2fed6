"""What training is going to do, in words, before it starts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from rose_ds.config import RoseConfig
from rose_ds.engines.base import Engine
from rose_ds.engines.dropout import find_dropout
from rose_ds.masks import policy_of

_MIB = 2**20


class Row(NamedTuple):
    """A trainable or frozen parameter, whole."""

    name: str
    numel: int
    masked: bool
    trainable: bool
    dtype: torch.dtype


def describe(engine: Engine, config: RoseConfig, objective: str) -> str:
    """In words: engine, batch, what is masked and how much of the model it is, dropout, and memory."""
    eligible, layout, steps = set(engine.eligible), engine.layout, engine.accumulation_steps
    rows = [
        Row(name, engine.numel(param), name in eligible, param.requires_grad, param.dtype)
        for name, param in engine.named_parameters()
    ]
    held, here = (sum(piece.numel for piece in pieces) for pieces in (engine.trainable_slices(), engine.slices))
    masks = mask_bytes(config, here, engine.optimizer.kernels)
    return "\n".join(
        [
            f"{objective}, {config.strategy} ({config.granularity}) on {engine.name}: {layout.tensor_count} tensors, "
            f"{layout.element_count:,} elements eligible; the rest is always updated",
            f"  an optimizer step is {steps} micro-batch{'es' * (steps > 1)} of each rank",
            *describe_parameters(rows),
            describe_dropout(engine.module, needed=config.compares_passes),
            describe_memory(held, here, masks=masks, risks=config.uses_first + config.keeps_risk),
            f"  the optimizer step is made of {step_kernels(engine.optimizer.kernels)}",
        ]
    )


def describe_parameters(rows: Iterable[Row]) -> list[str]:
    """One line for each kind of parameter, blocks taken together, and one of totals."""
    kinds: dict[tuple[str, str], list[int]] = {}
    rows = list(rows)
    for row in rows:
        what = "masked" if row.masked else "always" if row.trainable else "frozen"
        kinds.setdefault((re.sub(r"\.\d+\.", ".*.", row.name), what), []).append(row.numel)
    whole = sum(row.numel for row in rows)
    lines = [
        f"  {what}  {sum(sizes):>12,}  {sum(sizes) / whole:6.1%}  {name}{f'  (x{len(sizes)})' * (len(sizes) > 1)}"
        for (name, what), sizes in kinds.items()
    ]
    masked = sum(row.numel for row in rows if row.masked)
    types = ", ".join(dict.fromkeys(str(row.dtype).removeprefix("torch.") for row in rows))
    return [*lines, f"  masked in all {masked:,} of {whole:,} ({masked / whole:.1%}); weights are kept in {types}"]


def mask_bytes(config: RoseConfig, eligible: int, kernels: Any | None) -> int:
    """What the masks of so many elements take: a byte each, or a bit for each ranking where kernels make them."""
    policy = policy_of(config)
    if policy is None or config.granularity == "tensor":
        return 0
    compiled = hasattr(kernels, "Risks") and all(selector.kernel for selector in policy.selectors)
    return len(policy.selectors) * -(-eligible // 8) if compiled else eligible


def describe_memory(held: int, eligible: int, *, masks: int, risks: int) -> str:
    """What a rank holds for the optimizer besides the weights.

    Args:
        held: elements of trainable parameters whose states lie on this rank.
        eligible: how many of them may be masked.
        masks: bytes of their masks.
        risks: how many fp32 values are kept for each of these: a second gradient, an average of risks.
    """
    sizes = {"AdamW's states": 8 * held, "masks": masks, "first-order risk": 4 * eligible * risks}
    parts = [f"{what} {size / _MIB:,.1f} MiB" for what, size in sizes.items() if size]
    return f"  on this rank, beside weights, gradients and activations: {', '.join(parts)}"


def step_kernels(kernels: Any | None) -> str:
    """What an optimizer step runs on."""
    if kernels is None:
        return "torch's operations"
    return "compiled kernels for CPUs" if hasattr(kernels, "Risks") else "triton's kernels"


def describe_dropout(model: nn.Module, *, needed: bool = True) -> str:
    """What makes two passes differ; ``needed``: first-order risk is found by comparing two."""
    found = find_dropout(model)
    listed = ", ".join(f"{kind} {p:g}" for kind, p in found.items())
    return f"  dropout: {listed or 'none found' + ', so there is no first-order risk' * needed}"
