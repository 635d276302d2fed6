"""How often two dropout passes give an item two answers (Table 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rose_ds.analysis.load import Batch
from rose_ds.engines.rng import RngState, replay


@torch.inference_mode()
def disagreement(module: nn.Module, batches: Sequence[Batch], draws: int = 1, seed: int = 0) -> list[float]:
    """Of ``draws`` pairs of passes with dropout on: the fraction of rows whose two answers differ.

    The model's mode and the random state are those from before afterwards.

    Raises:
        ValueError: no two passes differ in any logit: the model has no dropout.
    """
    training = {m: m.training for m in module.modules()}
    found, moved = [], False
    try:
        module.train()
        with replay(RngState.now()):
            torch.manual_seed(seed)
            for _ in range(draws):
                different = rows = 0
                for batch in batches:
                    inputs = {name: value for name, value in batch.items() if name != "labels"}
                    a, b = (module(**inputs).logits for _ in range(2))
                    different += int((a.argmax(-1) != b.argmax(-1)).sum())
                    moved = moved or not torch.equal(a, b)
                    rows += len(a)
                found.append(different / rows)
    finally:
        for m, mode in training.items():
            m.training = mode
    if not moved:
        raise ValueError("two passes with dropout on give the same logits everywhere: the model has no dropout")
    return found
