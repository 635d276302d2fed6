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


_nursery = os.environ.get("ROSE_DS_TEST_NURSERY")
_unbuffered = sys.orig_argv[1:2] == ["-u"]
if _nursery and is_wanted(sys.orig_argv[1 + _unbuffered :]):
    from messenger import hand_over

    hand_over(_nursery, _unbuffered)
