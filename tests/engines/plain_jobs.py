"""The plain engine over ``tiny``, for its tests."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from tiny import Case, Tiny, make_model, micro_batch, parameter_groups, rows

from rose_ds import RoseAdamW, prepare


def build(case: Case, **options: Any) -> tuple[Tiny, Any]:
    """The case's model and stepper."""
    model = make_model(case)
    optimizer = RoseAdamW(parameter_groups(case, model, named=True), **{**case.rose, **options})
    stepper = prepare(
        model,
        optimizer,
        objective=case.objective,
        accumulation_steps=case.accumulation,
        max_grad_norm=case.clip,
    )
    return model, stepper


def one_step(model: Tiny, stepper: Any, t: int, loss: Any = None, forward: Any = None) -> Any:
    """A step on batch ``t``, with the loss or the forward pass replaced."""
    ids, labels = micro_batch(Case(), t, 0)
    with rows(len(ids), slice(0, len(ids))):
        stepper.backward(forward or (lambda: model(ids)), loss or (lambda logits: F.cross_entropy(logits, labels)))
        return stepper.step()
