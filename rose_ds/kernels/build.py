"""The C++ kernels, compiled where they first run and kept in a cache."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "csrc" / "kernels.cpp"
#: Of an extension's name.
PREFIX = "rose_ds_kernels_"
#: Seconds to wait for another process that builds: a minute's work, on a slow file system a few.
PATIENCE = 900.0
_FLAGS = [
    "-O3",
    "-march=native",
    "-std=c++20",
    "-fopenmp",
    "-fno-fast-math",  # some compilers' default; before those of its parts that change no result
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
    parts = [path.read_text(encoding="utf-8") for path in sources]
    parts += [" ".join(_FLAGS), torch.__version__, str(sys.implementation.cache_tag)]
    parts += [platform.machine(), flags, *platform.libc_ver()]
    return PREFIX + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def folder() -> Path:
    """Where it is built: in TORCH_EXTENSIONS_DIR, as DeepSpeed's operators are."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    return (Path(root) if root else Path.home() / ".cache" / "torch_extensions") / name()


@cache
def extension() -> Any | None:
    """The compiled module; None, and one line in the log, where there is none and it cannot be built."""
    where = Path("the cache")
    try:
        where = folder()
        built = where / f"{where.name}.so"
        return _import(built) if built.is_file() else _build(built)
    except (
        OSError,
        RuntimeError,
        ImportError,
        subprocess.SubprocessError,
    ) as error:  # no compiler, no ninja, no headers, no home, a full disk, another C library
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error: " in line), lines[0])  # the compiler's, not the command
        report(f"no kernels in {where} ({reason}): the optimizer step runs without")
        return None


def report(message: str) -> None:
    """Why this rank has no kernels; ranks but the first log errors alone."""
    logger.log(logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.ERROR, message)


def find_ninja() -> None:
    """Put a virtual environment's ninja on PATH where there is none: ssh, so DeepSpeed's pdsh, passes no PATH on."""
    beside = str(Path(sys.executable).parent)
    if shutil.which("ninja") is None and shutil.which("ninja", path=beside) is not None:
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), beside])


def _import(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(path: Path) -> Any:
    """Build what is to lie at ``path``, and import it.

    In a folder of its own, and moved once whole: what lies at ``path`` is never half a file, whoever else builds, and
    needs no compiler, no lock and no right to write. The lock, which goes with its holder, only saves work; a file
    system may keep it to one host.
    """
    from torch.utils.cpp_extension import load

    compiler = os.environ.get("CXX", "c++")  # may be of several words: ccache g++
    if shutil.which(next(iter(shlex.split(compiler)), "")) is None:
        raise RuntimeError(f"no C++ compiler: {compiler}")
    find_ninja()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.parent / "alone")
    try:
        lock.acquire(timeout=5)
    except Timeout:
        logger.info("waiting for another process that builds the kernels in %s", path.parent)
        lock.acquire(timeout=PATIENCE)
    try:
        if path.is_file():
            return _import(path)
        for left in path.parent.glob("build-*"):  # by a builder that was killed
            with suppress(OSError):  # another host does the same
                if time.time() - left.stat().st_mtime > PATIENCE:
                    shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent, ignore_cleanup_errors=True) as own:
            module = load(
                path.stem, [str(SOURCE)], extra_cflags=_FLAGS, extra_ldflags=["-fopenmp"], build_directory=own
            )
            if not path.is_file():  # one that another host uses stays
                Path(own, path.name).replace(path)
            return module
    finally:
        lock.release()
