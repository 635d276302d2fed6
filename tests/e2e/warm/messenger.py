"""What a Python does that has handed itself over: passes signals on, and ends as the other one ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)


def hand_over(nursery: str, unbuffered: bool) -> None:
    """Returns only where the nursery was made in another environment."""
    told = {
        "argv": sys.orig_argv[1 + unbuffered :],
        "orig_argv": sys.orig_argv,
        "unbuffered": unbuffered or "PYTHONUNBUFFERED" in os.environ,
        "executable": sys.executable,
        "env": dict(os.environ),
        "cwd": str(Path.cwd()),
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as there:
        there.connect(nursery)
        text = json.dumps(told).encode()
        socket.send_fds(there, [len(text).to_bytes(4, "big")], [0, 1, 2])
        there.sendall(text)
        if there.recv(1) != b"y":
            return
        for number in SIGNALS:
            signal.signal(number, lambda got, _: there.sendall(bytes([got])))
        code = there.recv(4)
    if not code:
        print("the nursery is gone, and the rank with it", file=sys.stderr)
    end_as(int.from_bytes(code, "big", signed=True) if code else 70)


def end_as(code: int) -> None:
    """End at once, with an exit code or, where it is negative, by that signal."""
    if code < 0:
        with suppress(OSError):  # SIGKILL, which nothing can stand in the way of
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
