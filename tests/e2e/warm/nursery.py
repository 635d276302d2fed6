"""A process that has imported torch, transformers and DeepSpeed, and forks ranks for sitecustomize.py.

    python tests/e2e/warm/nursery.py SOCKET MODULE ...

It ends, and all that it forked with it, when its standard input does. What is forked starts in a tenth of a second
instead of six; nothing of rose_ds is imported before. What it does not show is what an import does to a process of its
own, and ranks whose sets of strings have different orders: tests with the fixture ``cold`` start theirs as ever.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import io
import json
import os
import platform
import random
import runpy
import selectors
import signal
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from messenger import SIGNALS, end_as

#: Variables that imports read: who wants others than the nursery's has to import by himself.
READ = (
    "OMP_",
    "MKL_",
    "HF_",
    "TRANSFORMERS_",
    "TRITON_",
    "GLIBC_",
    "LD_",
    "LANG",
    "LC_",
    "DS_ACCELERATOR",
    "PYTHONHASH",
)


@dataclass
class Child:
    """What was forked, and the socket of its messenger."""

    pid: int
    messenger: socket.socket
    ends: int = field(init=False)
    """A file descriptor that is readable when it has ended."""

    def __post_init__(self) -> None:
        self.ends = os.pidfd_open(self.pid)


@dataclass
class Order:
    """What a messenger asks for."""

    argv: list[str]
    """A script, or -m and a module, and its arguments."""
    orig_argv: list[str]
    unbuffered: bool
    executable: str
    env: dict[str, str]
    cwd: str

    def can_be_forked(self) -> bool:
        def read(env: Any) -> dict[str, str]:
            return {name: value for name, value in env.items() if name.startswith(READ)}

        return self.executable == sys.executable and read(self.env) == read(os.environ)


class Nursery:
    def __init__(self, path: str, modules: list[str]) -> None:
        self.selector = selectors.DefaultSelector()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.children: list[Child] = []
        for name in modules:
            importlib.import_module(name)
        gc.collect()
        gc.freeze()
        atexit.register(gc.unfreeze)  # or nanobind reports leaks
        self.listener.bind(path)
        self.listener.listen(64)

    def serve(self) -> None:
        """Until standard input ends."""
        self.selector.register(0, selectors.EVENT_READ)
        self.selector.register(self.listener, selectors.EVENT_READ)
        while True:
            for key, _ in self.selector.select():
                if key.fileobj == 0:
                    for child in self.children:
                        os.kill(child.pid, signal.SIGKILL)
                    return
                if key.fileobj is self.listener:
                    self.take(self.listener.accept()[0])
                elif key.data in self.children:
                    self.attend(key.data, ended=key.fileobj == key.data.ends)

    def take(self, messenger: socket.socket) -> None:
        """Fork, and be what was asked for, or say that it has to be started as ever."""
        head, files, _, _ = socket.recv_fds(messenger, 4, 3)
        text = b""
        while len(text) < int.from_bytes(head, "big"):
            text += messenger.recv(1 << 20)
        order = Order(**json.loads(text))
        if not order.can_be_forked():
            messenger.sendall(b"n")
            messenger.close()
        elif (pid := os.fork()) == 0:
            pid_of_messenger = struct.unpack("3i", messenger.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            self.selector.close()
            for connection in (self.listener, messenger, *(child.messenger for child in self.children)):
                connection.close()
            join(pid_of_messenger)
            become(order, files)
            raise SystemExit
        else:
            child = Child(pid, messenger)
            self.children.append(child)
            self.selector.register(messenger, selectors.EVENT_READ, child)
            self.selector.register(child.ends, selectors.EVENT_READ, child)
            messenger.sendall(b"y")
        for file in files:
            os.close(file)

    def attend(self, child: Child, ended: bool) -> None:
        """Pass a signal on, or the news of its end."""
        if not ended:
            numbers = child.messenger.recv(16)
            for number in numbers or [signal.SIGKILL]:
                os.kill(child.pid, number)  # it has not been waited for: the number is still its own
            if not numbers:  # who asked is dead
                self.selector.unregister(child.messenger)
            return
        code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
        for watched in (child.ends, child.messenger):
            with suppress(KeyError):
                self.selector.unregister(watched)
        with suppress(BrokenPipeError):
            child.messenger.sendall(code.to_bytes(4, "big", signed=True))
        child.messenger.close()
        os.close(child.ends)
        self.children.remove(child)


def join(pid: int) -> None:
    """Enter a process's namespaces."""
    libc = ctypes.CDLL(None, use_errno=True)
    here, there = Path("/proc/self/ns"), Path(f"/proc/{pid}/ns")
    names = [n for n in ("net", "uts", "mnt", "pid") if (here / n).readlink() != (there / n).readlink()]
    entries = [os.open(there / name, os.O_RDONLY) for name in names]
    for name, entry in zip(names, entries, strict=True):
        if libc.setns(entry, 0) != 0:
            raise OSError(ctypes.get_errno(), f"setns {name}")
        os.close(entry)
    if "pid" not in names:  # which holds for a process's children alone
        return
    inside = os.fork()
    if inside == 0:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        return
    for number in SIGNALS:
        signal.signal(number, lambda got, _: os.kill(inside, got))
    end_as(os.waitstatus_to_exitcode(os.waitpid(inside, 0)[1]))


def become(order: Order, files: list[int]) -> None:
    """Run what was asked for as this process's __main__."""
    import numpy

    for to, file in enumerate(files):
        os.dup2(file, to)
        os.close(file)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    rest = [path for path in sys.path[1:] if path not in paths]
    os.environ.clear()
    os.environ.update(order.env)
    os.chdir(order.cwd)
    if order.unbuffered:
        for name, file in (("stdout", 1), ("stderr", 2)):
            raw = io.FileIO(file, "wb", closefd=False)
            setattr(sys, name, io.TextIOWrapper(raw, errors="backslashreplace", write_through=True))
    platform._uname_cache = None  # type: ignore[attr-defined]  # of the nursery's host
    random.seed()
    numpy.random.seed()
    module = order.argv[0] == "-m"
    sys.orig_argv = order.orig_argv
    sys.argv = order.argv[module:]
    first = order.cwd if module else str(Path(order.argv[0]).resolve().parent)
    sys.path[:] = [first, *order.env.get("PYTHONPATH", "").split(os.pathsep), *rest]
    if module:
        runpy.run_module(order.argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(order.argv[0], run_name="__main__")


if __name__ == "__main__":
    Nursery(sys.argv[1], sys.argv[2:]).serve()
