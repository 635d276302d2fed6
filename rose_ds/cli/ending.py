"""How a distributed program ends, so that a job that has succeeded is reported as one."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch.distributed as dist


@contextmanager
def ending_process_group() -> Iterator[None]:
    """Around a program's main function: takes the process group down, and with gloo ends the process.

    A gloo thread may still hold the tensor of the last collective. If it lets go while the interpreter is taken apart,
    it asks for Python's lock, is ended instead, and the process aborts (SIGABRT) after all its work is done. A process
    group that anything still refers to keeps these threads after destroy_process_group(), so the interpreter is not
    taken apart: exit functions run, output is flushed, and the process is gone with the exit code that it had. So it is
    for a rank whose program has ended its group by itself: nothing tells any more that it was not gloo's.
    Uncaught exceptions pass through.
    """
    end, code = None, 0
    try:
        yield
    except SystemExit as raised:
        if not isinstance(raised.code, int | None):
            raise
        end, code = raised, raised.code or 0
    gloo = "RANK" in os.environ
    if dist.is_available() and dist.is_initialized():
        gloo = "gloo" in dist.get_backend_config()
        dist.destroy_process_group()
    if gloo:
        _leave(code)
    if end is not None:
        raise end


def _leave(code: int) -> NoReturn:
    threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter does first: waits for other threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
