"""What a run's numbers came from: the commit, the packages, and the memory they took."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import rose_ds

_PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "numpy")


def commit(package: Path | None = None) -> str | None:
    """Commit of the checkout that rose_ds runs from, with "-dirty" where tracked files differ; None outside of one."""
    root = (package or Path(rose_ds.__file__).parent).resolve().parent
    if not (root / ".git").exists():  # an installed package may lie inside another project's checkout
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or a folder that git does not trust
        return None
    return found.stdout.strip() or None


def packages() -> dict[str, str]:
    """Versions by name: Python, rose_ds, and what it computes with."""
    found = {"python": ".".join(map(str, sys.version_info[:3])), "rose_ds": rose_ds.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


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
