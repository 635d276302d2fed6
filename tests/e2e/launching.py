"""Starting the project's programs as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(command: list[str], timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command from the repository's root; its output is shown where it fails."""
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path, "TOKENIZERS_PARALLELISM": "false", **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-6000:], sep="\n")
    return done
