"""warm/: ranks that are forked behave as ranks that are started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

PROGRAM = """
import os, sys, time
print(sys.argv[1:], os.environ["WORD"], os.getcwd(), "torch" in sys.modules, __name__, flush=True)
open("pid", "w").write(str(os.getpid()))
if sys.argv[1] == "wait":
    time.sleep(100)
os.kill(os.getpid(), 9) if sys.argv[1] == "die" else sys.exit(7)
"""


def start(folder: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    (folder / "rank.py").write_text(PROGRAM)
    env = {**os.environ, "RANK": "0", "WORD": "here", **env}
    command = [sys.executable, "-u", "rank.py", *arguments]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True)


def running(folder: Path) -> psutil.Process:
    deadline = time.monotonic() + 20
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return psutil.Process(int((folder / "pid").read_text()))


@pytest.mark.parametrize(("what", "code"), [("end", 7), ("die", -9)])
def test_output_and_exit_code(what: str, code: int, tmp_path: Path) -> None:
    process = start(tmp_path, what, "b")
    assert process.communicate()[0] == f"['{what}', 'b'] here {tmp_path} True __main__\n"
    assert process.returncode == code
    assert int((tmp_path / "pid").read_text()) != process.pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals(number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path, "wait")
    rank = running(tmp_path)
    assert rank.pid != process.pid
    process.send_signal(number)
    assert process.wait(20) == -number
    assert not psutil.wait_procs([rank], timeout=20)[1]


@pytest.mark.parametrize("env", [{"HF_HOME": "/elsewhere"}, {"ROSE_DS_TEST_NURSERY": ""}])
def test_what_imports_read_is_not_shared(env: dict[str, str], tmp_path: Path) -> None:
    process = start(tmp_path, "end", **env)
    assert process.communicate()[0] == f"['end'] here {tmp_path} False __main__\n"
    assert process.returncode == 7
    assert int((tmp_path / "pid").read_text()) == process.pid
