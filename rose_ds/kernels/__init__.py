"""Kernels for what a step costs beside its passes. Core's torch operations are their oracle, to the last bit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rose_ds.kernels import build

VARIABLE = "ROSE_DS_KERNELS"
_CHOICES = ("auto", "torch", "cpp")
#: Eligible elements, over all ranks, from which auto takes the kernels: below, a step is not worth a compiler's minute.
LARGE = 1 << 24


def kernels_for(elements: int, slices: Sequence[Tensor]) -> Any | None:
    """The C++ kernels, where they are wanted and can be used; None: core's torch operations.

    Args:
        elements: eligible elements over all ranks.
        slices: the parameters that the optimizer holds.

    Raises:
        ValueError: ROSE_DS_KERNELS is no choice.
        RuntimeError: it is cpp, and the kernels cannot be built or do not fit these tensors.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in _CHOICES:
        raise ValueError(f"{VARIABLE}={choice!r} is not one of {list(_CHOICES)}")
    if choice == "torch" or (choice == "auto" and elements < LARGE):
        return None
    fit = all(fits(p) for p in slices)
    if choice == "cpp" and not fit:
        raise RuntimeError(f"{VARIABLE}=cpp: the kernels take fp32 weights on CPUs alone; leave it at auto")
    found = build.extension() if fit else None
    if choice == "cpp" and found is None:
        raise RuntimeError(f"{VARIABLE}=cpp, but the kernels could not be built: the log says why; leave it at auto")
    return found


def fits(tensor: Tensor, *, half: bool = False) -> bool:
    """Whether the kernels read this tensor: fp32 (or bf16, where it is a gradient), contiguous, on the CPU."""
    types = (torch.float32, torch.bfloat16) if half else (torch.float32,)
    return tensor.device.type == "cpu" and tensor.dtype in types and tensor.is_contiguous()
