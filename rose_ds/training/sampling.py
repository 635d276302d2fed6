"""The rows of a micro-batch that a fast first-order risk is found from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rose_ds.errors import RefusedConfiguration


def sample_rows(inputs: Mapping[str, Any], fraction: float = 0.25) -> tuple[dict[str, Any], Tensor]:
    """Evenly spaced rows of a micro-batch, at least one: a random sample wherever batches are shuffled.

    No random numbers are drawn, so that passes over all rows have the dropout masks they would have had.

    Args:
        inputs: a model's keyword arguments; tensors have the rows first. What is no tensor, or has no dimension, is
            passed on as it is.
        fraction: of the rows, in (0, 1]; rounded up.

    Returns:
        The model's arguments for these rows, and the rows: shape (n,), int64. With ``Stepper.backward``:
        ``some, rows = sample_rows(batch)`` and ``sample=Sample(lambda: model(**some).logits, rows)``.

    Raises:
        RefusedConfiguration: tensors do not all begin with the same number of rows (packed texts, patches of images),
            so nobody can say which part of them is a row's.
    """
    sizes = {name: len(value) for name, value in inputs.items() if isinstance(value, Tensor) and value.dim()}
    if len(set(sizes.values())) != 1 or any(isinstance(value, (Mapping, list, tuple)) for value in inputs.values()):
        raise RefusedConfiguration(
            'first_order="fast" runs some rows of a micro-batch again, and these inputs do not all begin with its rows '
            f"({', '.join(f'{name}: {size}' for name, size in sizes.items()) or 'no tensors'}): set risk_rows=1, which "
            'runs all of them, or first_order="exact"'
        )
    count = next(iter(sizes.values()))
    wanted = max(1, math.ceil(fraction * count - 1e-9))
    rows = torch.arange(wanted) * count // wanted
    picked = {name: value[rows.to(value.device)] if name in sizes else value for name, value in inputs.items()}
    return picked, rows
