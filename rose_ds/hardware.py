"""What the machine's processors can do."""

from __future__ import annotations

import os
import sys

import torch

#: Instructions that multiply matrices of bf16, on x86-64 and on ARM, as torch names them.
_BF16 = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")


def default_device() -> torch.device:
    """The accelerator, if there is one; this rank's, under a launcher."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return torch.device("cpu")
    return torch.device(found.type, int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())


def has_bf16(device: torch.device | str | None = None) -> bool:
    """Whether a device multiplies bf16 itself. Default: the one that training takes. A CPU that does not is an order of
    magnitude slower in bf16 than in fp32.
    """
    device = default_device() if device is None else torch.device(device)
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return any(found.get(name) for name in _BF16)
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def slow_bf16(device: torch.device) -> str:
    """A warning for passes in bf16; empty where there is no reason for one."""
    if device.type != "cpu" or has_bf16(device):
        return ""
    return "this CPU has no bf16 instructions, and passes in bf16 are many times slower than in fp32: leave bf16 out"


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory that this process has held: allocated on its CUDA device, else resident; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
