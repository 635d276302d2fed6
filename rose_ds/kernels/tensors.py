"""What kernels read, on whatever device."""

from __future__ import annotations

import torch
from torch import Tensor

_FULL, _WITH_HALF = (torch.float32,), (torch.float32, torch.bfloat16)


def readable(tensor: Tensor, *, half: bool = False) -> bool:
    """Whether it is fp32 (or bf16, where it is a gradient: ``half``) and contiguous."""
    return tensor.dtype in (_WITH_HALF if half else _FULL) and tensor.is_contiguous()
