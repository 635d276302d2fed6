"""Work on many items, shared among ranks, that goes on where it was killed: a log of JSON lines for each rank."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rose_ds.training.checkpoints import changed


class ResumableLog:
    """A line of settings, then a record a line, each written as it is found.

    Args:
        settings: of what is worked out; a log with others is another's.

    Raises:
        ValueError: the log is of other settings, or damaged before its last line.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.is_file() else b""
        whole = content.rfind(b"\n") + 1
        if whole:
            os.truncate(path, whole)  # a kill may have left half a line
            first, *self.records = read_log(path)
            different = changed(first.get("settings") or {}, dict(settings))
            if different:
                raise ValueError(f"{path} is of other settings ({', '.join(different)}): choose another, or delete it")
        else:
            self.records = []
            """What was there already."""
            path.write_text(_line({"settings": dict(settings)}), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record, at once."""
        self._file.write(_line(record))
        self._file.flush()

    def __enter__(self) -> ResumableLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def digest(columns: Iterable[Sequence[Any]]) -> str:
    """Twelve hexadecimal digits of rows' columns: what a log is of."""
    found = hashlib.sha256()
    for column in columns:
        found.update(json.dumps(list(column), ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return found.hexdigest()[:12]


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log: its settings, then its records.

    Raises:
        ValueError: a line is not JSON; names file and line.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a line of a log ({error})") from error


def records_of(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The records of several ranks' logs."""
    return [record for path in paths for record in list(read_log(path))[1:]]


def logs_of(folder: Path, name: str, world: int) -> list[Path]:
    """The logs of all ranks of a work."""
    return [folder / f"{name}-{rank}-of-{world}.jsonl" for rank in range(world)]


def rank_and_world() -> tuple[int, int]:
    """Of a launcher's environment; (0, 1) without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def all_ranks() -> Iterator[None]:
    """Leaves when every rank has come to the end of the block."""
    world = rank_and_world()[1]
    if world > 1 and not dist.is_initialized():  # a rank may have the harder items
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    yield
    if world > 1:
        dist.barrier()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
