"""What a run's numbers came from: the commit, the packages, and the memory they took."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import rose_ds

_PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "numpy")


def commit(package: Path | None = None) -> str | None:
    """Commit of the checkout that rose_ds runs from; None outside of one.

    "-dirty" where tracked files of the package itself differ: a sweep changes its own store, which may lie beside it.
    """
    package = (package or Path(rose_ds.__file__).parent).resolve()
    root = package.parent
    if not (root / ".git").exists():  # an installed package may lie inside another project's checkout
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", package.name)
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):  # no git, no commit yet, or a folder that git does not trust
        return None


def packages() -> dict[str, str]:
    """Versions by name: Python, rose_ds, and what it computes with."""
    found = {"python": ".".join(map(str, sys.version_info[:3])), "rose_ds": rose_ds.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The machine of this rank: ``host``, ``cpu``, ``cores`` this process may use, ``memory_bytes``, and where there
    are any ``accelerators`` (their number) and ``accelerator`` (the first one's name).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"host": platform.node(), "cpu": _cpu(), "cores": cores, "threads": torch.get_num_threads()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.cuda.is_available():
        found |= {"accelerators": torch.cuda.device_count(), "accelerator": torch.cuda.get_device_name(0)}
    return found


def _cpu() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8", errors="replace").splitlines() if table.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
