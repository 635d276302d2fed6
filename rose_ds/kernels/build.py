"""The C++ kernels, compiled where they first run and kept in a cache."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "csrc" / "kernels.cpp"
#: Of an extension's name.
PREFIX = "rose_ds_kernels_"
_FLAGS = [
    "-O3",
    "-march=native",
    "-std=c++20",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]


def name() -> str:
    """Of the extension: with all that a build depends on, as homes are shared by machines with other processors."""
    flags = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    sources = sorted(path for path in SOURCE.parent.iterdir() if path.suffix in (".cpp", ".h"))  # no editor's files
    parts = [*(path.read_text() for path in sources), " ".join(_FLAGS), torch.__version__, platform.machine(), flags]
    return PREFIX + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def folder() -> Path:
    """Where it is built: in TORCH_EXTENSIONS_DIR, as DeepSpeed's operators are."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    return (Path(root) if root else Path.home() / ".cache" / "torch_extensions") / name()


@cache
def extension() -> Any | None:
    """The compiled module; None, and one line in the log, where it cannot be built."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        logger.warning("no C++ compiler (%s): the optimizer step runs without kernels", os.environ.get("CXX", "c++"))
        return None
    from torch.utils.cpp_extension import load

    where = folder()
    try:
        where.mkdir(parents=True, exist_ok=True)
        # One builder at a time, by a lock that is given back when its holder dies. Torch's own lock file is not, and
        # every later build would wait for it for ever: whatever lies there now is a dead builder's.
        with FileLock(where / "alone"):
            (where / "lock").unlink(missing_ok=True)
            return load(
                where.name, [str(SOURCE)], extra_cflags=_FLAGS, extra_ldflags=["-fopenmp"], build_directory=str(where)
            )
    except (
        OSError,
        RuntimeError,
        ImportError,
        subprocess.SubprocessError,
    ) as error:  # no ninja, no headers, a full disk, another compiler
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error: " in line), lines[0])  # the compiler's, not the command
        logger.warning("the kernels in %s could not be built (%s): the optimizer step runs without", where, reason)
        return None
