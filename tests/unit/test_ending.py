"""A distributed program's last moments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: An object that is there until the interpreter is taken apart tells whether that happened.
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import atexit, sys, threading, time
import torch.distributed as dist
from rose_ds.cli.ending import ending_process_group

class Witness:
    def __del__(self):
        print("taken apart", flush=True)

def late():
    time.sleep(0.3)
    print("thread")

witness = Witness()
atexit.register(lambda: print("exit function, process group:", dist.is_initialized()))
with ending_process_group():
    if sys.argv[1] == "gloo":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    threading.Thread(target=late).start()
    print("worked")
    exec(sys.argv[2])
"""


def end(kind: str, how: str, **env: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command, env = [sys.executable, "-c", PROGRAM, kind, how], {**os.environ, "PYTHONPATH": paths, **env}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


@pytest.mark.parametrize(("how", "code"), [("pass", 0), ("sys.exit()", 0), ("sys.exit(143)", 143)])
def test_the_interpreter_is_not_taken_apart_under_gloo(how: str, code: int) -> None:
    done = end("gloo", how)
    assert done.stdout.splitlines() == ["worked", "thread", "exit function, process group: False"], done.stderr
    assert done.returncode == code


def test_nor_where_the_program_has_ended_its_process_group() -> None:
    done = end("gloo", "dist.destroy_process_group()", RANK="0")
    assert done.stdout.splitlines() == ["worked", "thread", "exit function, process group: False"], done.stderr
    assert done.returncode == 0


def test_exceptions_pass_through() -> None:
    done = end("gloo", "raise ValueError('of the program')")
    assert "ValueError: of the program" in done.stderr.splitlines()[-1]
    assert done.returncode == 1


def test_messages_as_exit_codes_pass_through() -> None:
    done = end("gloo", "sys.exit('the reason')")
    assert "the reason" in done.stderr.splitlines()
    assert done.returncode == 1


@pytest.mark.parametrize(("how", "code"), [("pass", 0), ("sys.exit(3)", 3)])
def test_a_single_process_ends_as_always(how: str, code: int) -> None:
    done = end("plain", how)
    assert done.stdout.splitlines()[-1] == "taken apart"
    assert done.returncode == code
