"""The most memory that a process holds in a phase, by the kernel's account or CUDA's."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

#: Environment in which glibc gives every block of 64 KiB back at once, so that the mark follows live tensors; in huge
#: pages, or each use of one would be thousands of page faults.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def status() -> dict[str, int]:
    """Bytes of this process by Linux's account: VmHWM, RssAnon, RssFile, RssShmem."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1:] == ["kB"]}


class Meter:
    """Peaks of a process's own memory on the CPU, above what it had when the meter was made. Linux only."""

    def __init__(self) -> None:
        self.base = status()["RssAnon"]

    def reset(self) -> None:
        """Start a phase."""
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Bytes at the phase's highest point."""
        now = status()
        return now["VmHWM"] - now["RssFile"] - now["RssShmem"] - self.base

    def current(self) -> int:
        """Bytes now, without what was freed."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return status()["RssAnon"] - self.base


class CudaMeter:
    """The same of what torch has allocated on the current CUDA device."""

    def reset(self) -> None:
        """Start a phase."""
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Bytes at the phase's highest point."""
        return torch.cuda.max_memory_allocated()


class NoMeter:
    """Where nobody says: other systems than Linux, other accelerators than CUDA's."""

    def reset(self) -> None:
        """Start a phase."""

    def peak(self) -> None:
        """Not known."""


def meter_for(device: torch.device) -> Meter | CudaMeter | NoMeter:
    """What measures the memory of a model on this device."""
    if device.type == "cuda":
        return CudaMeter()
    linux = device.type == "cpu" and Path("/proc/self/clear_refs").exists()
    return Meter() if linux else NoMeter()
