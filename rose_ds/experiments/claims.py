"""Who runs a cell: a lock that dies with its holder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class Claim:
    """The right to run a cell: an exclusive flock(2) on a file in its folder.

    The kernel gives it up when the last process that has the file open is gone, however it ended, so a claim is never
    left behind and never taken from the living. The run inherits the open file: where a sweep alone is killed, its run
    goes on, and the cell stays claimed. On a file system shared by machines flock must reach all of them: NFS since
    Linux 2.6.12, Lustre mounted with -o flock, GPFS, CephFS.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def release(self) -> None:
        """Close this process's copy."""
        os.close(self.descriptor)


def lock(folder: Path) -> Claim | None:
    """Claim a folder; None where another process has it. Raises ValueError where that cannot be known."""
    try:
        descriptor = os.open(folder / "claim", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(f"cannot claim {folder}: {error.strerror}") from error
    return Claim(descriptor) if _locked(descriptor, fcntl.LOCK_EX, folder) else None


def is_claimed(folder: Path) -> bool:
    """For whoever only looks, and may not write."""
    try:
        descriptor = os.open(folder / "claim", os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ValueError(f"cannot see whether {folder} is claimed: {error.strerror}") from error
    if not _locked(descriptor, fcntl.LOCK_SH, folder):
        return True
    os.close(descriptor)
    return False


def _locked(descriptor: int, kind: int, folder: Path) -> bool:
    """Whether the lock was to be had; closes the file where it was not."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return False
        raise ValueError(f"no lock on a file in {folder} ({error.strerror}): use a file system with flock") from error
    return True
