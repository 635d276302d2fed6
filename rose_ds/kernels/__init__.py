"""Kernels for what a step costs beside its passes. Core's torch operations are their oracle, to the last bit."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rose_ds.kernels import build, triton_backend
from rose_ds.kernels.tensors import readable

logger = logging.getLogger(__name__)

VARIABLE = "ROSE_DS_KERNELS"
_CHOICES = ("auto", "torch", "cpp", "triton")
#: Elements, over all ranks, from which auto compiles kernels for CPUs: a step that ranks so many is a third of a second
#: shorter by them, which pays for the compiler after a hundred. Triton's few seconds are always paid.
LARGE = 1 << 23


def kernels_for(
    elements: int, slices: Sequence[Tensor], *, masks: bool = True, devices: set[torch.device] | None = None
) -> Any | None:
    """The C++ kernels or, on a CUDA device, Triton's, where they are wanted and can be used; None: core's torch
    operations.

    Args:
        elements: over all ranks; the eligible ones, where there are masks, or else the trainable ones.
        slices: the parameters that the optimizer holds.
        masks: whether there are any: AdamW without them has torch's fused kernel on accelerators, and none on CPUs that
            rounds alike on any number of ranks.
        devices: where the rank's tensors lie; default: its slices'.

    Raises:
        ValueError: ROSE_DS_KERNELS is no choice.
        RuntimeError: it is cpp or triton, and the kernels cannot be built or do not fit these tensors.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in _CHOICES:
        raise ValueError(f"{VARIABLE}={choice!r} is not one of {list(_CHOICES)}")
    if choice == "torch":
        return None
    devices = {p.device for p in slices} if devices is None else devices
    cuda = len(devices) == 1 and next(iter(devices)).type == "cuda"
    if not masks and (choice == "triton" or cuda):
        return None
    if choice == "triton" or (choice == "auto" and cuda):
        return _triton(devices, slices, must=choice == "triton")
    if choice == "auto" and elements < LARGE:
        return None
    fit = all(fits(p) for p in slices) and not cuda
    if choice == "cpp" and not fit:
        raise RuntimeError(f"{VARIABLE}=cpp: the kernels take contiguous fp32 weights on CPUs alone; leave it at auto")
    if not fit:
        logger.info("weights that are not contiguous fp32 on a CPU: the optimizer step runs without kernels")
    found = build.extension() if fit else None
    if choice == "cpp" and found is None:
        raise RuntimeError(f"{VARIABLE}=cpp, but the kernels could not be built: the log says why; leave it at auto")
    return found


def _triton(devices: set[torch.device], slices: Sequence[Tensor], *, must: bool) -> Any | None:
    types = {device.type for device in devices}
    fit = types == {"cuda"} or (types == {"cpu"} and triton_backend.interpreted())
    fit = fit and len(devices) == 1 and all(map(readable, slices))
    if must and not fit:
        raise RuntimeError(
            f"{VARIABLE}=triton: the kernels take contiguous fp32 weights on one CUDA device (on CPUs, with "
            "TRITON_INTERPRET=1 and triton installed, to test them); leave it at auto"
        )
    found = triton_backend.load(next(iter(devices))) if fit else None
    if must and found is None:
        raise RuntimeError(f"{VARIABLE}=triton, but triton's kernels do not run: the log says why; leave it at auto")
    return found


def fits(tensor: Tensor, *, half: bool = False) -> bool:
    """Whether the C++ kernels read this tensor: fp32 (or bf16, where it is a gradient), contiguous, on the CPU."""
    return tensor.is_cpu and readable(tensor, half=half)
