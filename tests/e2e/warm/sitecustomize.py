"""Hands a rank that starts over to a process that has imported what half of its life would go into.

Python runs this file when it starts, where its folder is in PYTHONPATH. A rank, or a command of rose-ds, becomes the
messenger of a process that nursery.py forks for it: same arguments, environment, folder, files and namespaces. Signals
go there, and it ends as that one ends. Any other Python goes on as if nothing had been.
"""

import os
import sys
from pathlib import Path


def is_wanted(told: "list[str]") -> bool:
    """A rank, or a command of rose-ds that starts no others; launchers stay their ranks' parents."""
    if told[:1] == ["-m"]:
        return "RANK" in os.environ or (told[1:2] == ["rose_ds"] and told[2:3] != ["sweep"])
    script = Path(told[0]).name if told else "-"
    return script[0] != "-" and ("RANK" in os.environ or (script == "rose-ds" and told[1:2] != ["sweep"]))


def hand_over(at: str, unbuffered: bool) -> None:
    """Never returns, unless the environment is not what the nursery's imports were made in."""
    import json
    import signal
    import socket

    told = {
        "argv": sys.orig_argv[1 + unbuffered :],
        "orig_argv": sys.orig_argv,
        "unbuffered": unbuffered or "PYTHONUNBUFFERED" in os.environ,
        "executable": sys.executable,
        "env": dict(os.environ),
        "cwd": str(Path.cwd()),
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as there:
        there.connect(at)
        text = json.dumps(told).encode()
        socket.send_fds(there, [len(text).to_bytes(4, "big")], [0, 1, 2])
        there.sendall(text)
        if there.recv(1) != b"y":
            return
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
            signal.signal(number, lambda got, _: there.sendall(bytes([got])))
        ended = there.recv(2)
    if len(ended) < 2:
        os._exit(70)  # the nursery is gone
    if ended[0]:  # by a signal
        signal.signal(ended[0], signal.SIG_DFL) if ended[0] not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), ended[0])
    os._exit(ended[1])


_at = os.environ.get("ROSE_DS_TEST_NURSERY")
_unbuffered = sys.orig_argv[1:2] == ["-u"]
if _at and is_wanted(sys.orig_argv[1 + _unbuffered :]):
    hand_over(_at, _unbuffered)
