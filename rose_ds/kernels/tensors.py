"""What kernels read, on whatever device."""

from __future__ import annotations

import torch
from torch import Tensor


def readable(tensor: Tensor, *, half: bool = False) -> bool:
    """Whether it is fp32 (or bf16, where it is a gradient: ``half``) and contiguous."""
    return tensor.dtype in ((torch.float32, torch.bfloat16) if half else (torch.float32,)) and tensor.is_contiguous()
