"""One job to an output folder: a lock that ends with the process that holds it, however it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rose_ds.errors import RefusedConfiguration
from rose_ds.training import checkpoints

logger = logging.getLogger(__name__)

FILE = "_rose_ds.lock"  # which Trainer does not push to the hub
#: Seconds that a job waits for another one on this host: a killed job's processes take some to end.
PATIENCE = 10.0
#: The same where the other one was on another host: a file server keeps the locks of a host that lost power for as long
#: as its lease, by NFS's default 90 seconds.
PATIENCE_ELSEWHERE = 120.0
#: Seconds after which all ranks hear that the first one waits still.
_TURN = 5.0
#: What flock says on a file system without locks.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_held: set[Path] = set()


@contextmanager
def sole_use_of(folder: Path) -> Iterator[None]:
    """Around all that writes into a job's output folder. Every rank calls it; rank 0 holds the lock.

    The lock is flock's on FILE, so it goes with its holder, by SIGKILL too: a job that is put back into a queue gets
    the folder at once. Inside a block for the same folder it does nothing. Where the file system has no locks, that is
    logged and nothing is locked.

    Raises:
        RefusedConfiguration: another job holds the folder, or it cannot be written to; on every rank alike.
    """
    where = folder.resolve()
    if where in _held:
        yield
        return
    made = [path for path in (where, *where.parents) if not path.exists()]
    start, lock, refused = time.monotonic(), None, _unwritable(where)
    waits = True
    while waits:
        waits = False
        if _rank() == 0 and refused is None:
            try:
                lock, waits = _take(where, start)
            except RefusedConfiguration as error:
                refused = str(error)
        found = checkpoints.gather((refused, waits))
        refused = next((words for words, _ in found if words is not None), None)
        waits = refused is None and any(more for _, more in found)
    if refused is None:
        _held.add(where)
    try:
        if refused is not None:
            raise RefusedConfiguration(refused)
        yield
    finally:
        _held.discard(where)
        if lock is not None:
            lock.release()
        for path in made:  # a job that was refused before it wrote anything leaves nothing
            with suppress(OSError):
                path.rmdir()


def is_used(folder: Path) -> bool:
    """Whether a job has the folder now, on any host that sees its locks."""
    try:
        descriptor = os.open(folder / FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    finally:
        os.close(descriptor)
    return False


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _unwritable(folder: Path) -> str | None:
    """Why this rank cannot write there, with the way out."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):  # on a read-only file system false for root too
            return None
        reason = "no permission, or a read-only file system"
    except OSError as error:
        reason = error.strerror or str(error)
    return _not_writable(folder, reason)


def _not_writable(folder: Path, reason: str) -> str:
    return (
        f"--output_dir {folder} cannot be written to ({reason}) by {socket.gethostname()}: mend that, or choose "
        "another --output_dir"
    )


class _Lock:
    """flock on an open file, which a child process does not keep after the fork."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor

    def write(self, record: dict[str, Any]) -> None:
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps(record).encode(), 0)

    def release(self) -> None:
        _open.discard(self.descriptor)
        self.path.unlink(missing_ok=True)  # while it is held: who opened it meanwhile finds another file there
        os.close(self.descriptor)


#: Descriptors of locks that this process holds. A forked child (a data loader's worker) would hold them too, and live
#: on after its parent was killed.
_open: set[int] = set()


def _close_in_child() -> None:
    for descriptor in _open:
        os.close(descriptor)  # closing is not unlocking: the parent has it open
    _open.clear()
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _take(folder: Path, start: float) -> tuple[_Lock | None, bool]:
    """The folder's lock, None where there are none; and whether to come back for it: the other ranks wait meanwhile,
    and not for longer than a process group's timeout. ``start``: when the waiting began.
    """
    turn = time.monotonic()
    told = turn - start > _TURN
    while time.monotonic() - turn < _TURN:
        try:
            lock = _try(folder / FILE)
            if lock is not None:
                host = socket.gethostname()
                lock.write({"host": host, "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
                _open.add(lock.descriptor)
                return lock, False
        except OSError as error:
            if error.errno in _NO_LOCKS:
                logger.warning("the file system of %s has no locks: nothing keeps a second job from it", folder)
                return None, False
            raise RefusedConfiguration(_not_writable(folder, error.strerror or str(error))) from error
        holder = _holder(folder / FILE)
        patience = PATIENCE if holder.get("host") in (None, socket.gethostname()) else PATIENCE_ELSEWHERE
        if time.monotonic() - start > patience:
            who = f"process {holder['pid']} on {holder['host']} since {holder['since']}" if holder else "another job"
            raise RefusedConfiguration(
                f"--output_dir {folder} is in use by {who}: wait for that job's end or stop it, or choose another "
                "--output_dir"
            )
        if not told:
            logger.info("%s is in use by another job: waiting up to %.0f s for its end", folder, patience)
            told = True
        time.sleep(0.2)
    return None, True


def _try(path: Path) -> _Lock | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return _Lock(path, descriptor)
    except (BlockingIOError, FileNotFoundError):  # held; or the holder has just released and removed it
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _holder(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
        return {name: record[name] for name in ("host", "pid", "since")}
    except (OSError, ValueError, KeyError, TypeError):  # it has just been made, or just been removed
        return {}
