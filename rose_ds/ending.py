"""How a distributed program ends, so that a job that has succeeded is reported as one."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def ending_process_group() -> Iterator[None]:
    """Around a program's main function: takes the process group down, and with gloo ends the process.

    A gloo thread may still hold the tensor of the last collective. If it lets go while the interpreter is taken apart,
    it asks for Python's lock, is ended instead, and the process aborts (SIGABRT) after all its work is done. A process
    group that anything still refers to keeps these threads after destroy_process_group(), so the interpreter is not
    taken apart: exit functions run, output is flushed, and the process is gone with the exit code that it had.
    Uncaught exceptions pass through.
    """
    code = 0
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.code, int | None) or not _distributed():
            raise
        code = end.code or 0
    if not _distributed():
        return
    gloo = "gloo" in dist.get_backend_config()
    dist.destroy_process_group()
    if not gloo:
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter does first: waits for other threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
