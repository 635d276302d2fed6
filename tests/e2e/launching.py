"""Starting the project's programs as a user does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(command: list[str], timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command from the repository's root; its output is shown where it fails.

    Past ``timeout`` seconds the command and all that it started are killed.
    """
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path, "TOKENIZERS_PARALLELISM": "false", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        print(out[-4000:], err[-6000:], sep="\n")
        raise
    if process.returncode:
        print(out[-4000:], err[-6000:], sep="\n")
    return subprocess.CompletedProcess(command, process.returncode, out, err)
