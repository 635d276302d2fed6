"""Which checkpoints are whole, and whether a run may go on from one.

Many ranks write a checkpoint's files, and any of them may be killed or run out of disk at any byte. So the last thing
written, once every rank has finished, is a record with the name and size of every file. A folder without a record, or
with other files than it lists, was torn and is never resumed from.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rose_ds.errors import RefusedConfiguration
from rose_ds.exchange import explaining_lost_ranks

logger = logging.getLogger(__name__)

FILE = "rose_checkpoint.json"
#: Files that callbacks write again; of weights and states another size means that they are torn.
_TEXT = (".json", ".jsonl", ".md", ".txt")

#: Engines that read each other's files: a run may go on from one to another.
_SAME_FILES = {"plain": "whole", "ddp": "whole", **dict.fromkeys(("zero1", "zero2", "zero3"), "partitions")}


class CheckpointError(RuntimeError):
    """A checkpoint or the trained model could not be written; the message names it and the newest whole checkpoint."""


@dataclass(frozen=True)
class Record:
    """What a whole checkpoint consists of, and the run it belongs to."""

    step: int
    optimizer_steps: int
    """Less than ``step`` where steps were skipped."""
    world_size: int
    engine: str
    files: dict[str, int]
    """Size in bytes of every file, by its path inside the folder."""
    fixed: dict[str, Any]
    """Settings that a resumed run must share, by their flags' names."""
    free: dict[str, Any]
    """Settings that a resumed run may change."""
    totals: dict[str, float] = field(default_factory=dict)
    """What was counted since the run began."""
    unlogged_loss: list[float] = field(default_factory=list)
    """Each rank's loss summed over the steps after ``logged_step``, the last step that was logged."""
    unlogged_disagreements: list[list[float]] = field(default_factory=list)
    """The same of the fraction of rows with two answers: each rank's micro-batches."""
    logged_step: int = 0

    def write(self, folder: Path) -> None:
        """Write the record whole or not at all, and to the disk itself."""
        temporary = folder / f".{FILE}.{os.getpid()}"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / FILE)
        to_disk([folder])


def files_in(folder: Path) -> dict[str, int]:
    """Size of every file of a checkpoint but its record."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith((FILE, f".{FILE}")):
            found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return found


def files_below(run_dir: Path) -> dict[Path, dict[Path, int]]:
    """Files of a run's checkpoints and of those of a search's trials, by folder, and when each was written; what other
    jobs take away meanwhile is left out.
    """
    found: dict[Path, dict[Path, int]] = {}
    for form in ("checkpoint-*", "*/checkpoint-*"):
        with suppress(OSError):
            for folder in run_dir.glob(form):
                files = found[folder] = {}
                for where, _, names in os.walk(folder):
                    for path in (Path(where, name) for name in names):
                        with suppress(OSError):
                            files[path] = path.stat().st_ctime_ns  # of a copy with another file's time too
    return found


def to_disk(paths: Iterable[Path]) -> None:
    """Files and folders, as far as this host has written them; some file systems notice only here that there is no
    room.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(folder: Path) -> Record:
    """The record of a whole checkpoint.

    Raises:
        RefusedConfiguration: the folder has no record, or a file is missing or has another size; names the file.
    """
    path = folder / FILE
    if not path.is_file():
        raise RefusedConfiguration(
            f"{path} is missing: the checkpoint was not written to its end, or not by rose_ds. "
            "train(resume_from_checkpoint=True), or --resume auto, takes the newest that is whole; to begin with the "
            "weights of another run's, load the model from its folder instead"
        )
    try:
        record = Record(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise RefusedConfiguration(f"{path} is not a checkpoint's record: {error}") from error
    for name, size in record.files.items():
        file = folder / name
        if not file.is_file():
            raise RefusedConfiguration(f"{file} is missing")
        if file.stat().st_size != size:
            raise RefusedConfiguration(f"{file} has {file.stat().st_size} bytes, {size} were written")
    return record


def whole_in(output_dir: Path) -> tuple[dict[int, Path], list[str]]:
    """The whole checkpoints of a run by their step, as this process sees them, and why others are passed over."""
    whole, torn = {}, []
    for folder in sorted(output_dir.glob("checkpoint-*")):
        if re.fullmatch(r"checkpoint-\d+", folder.name) and folder.is_dir():
            try:
                whole[read(folder).step] = folder
            except RefusedConfiguration as error:
                torn.append(str(error))
    return whole, torn


def newest(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole on every rank, and why others are passed over. Every rank calls it."""
    whole, torn = whole_in(output_dir)
    everywhere = set.intersection(*(set(steps) for steps in gather(list(whole))))
    torn += [f"{whole[step]} is not whole on every rank" for step in sorted(set(whole) - everywhere)]
    return (whole[max(everywhere)] if everywhere else None), torn


def not_written(what: Path | str, output_dir: Path, error: BaseException) -> CheckpointError:
    """The error to raise for one that came up while ``what`` was written into a run's folder."""
    for wrapped, _ in getattr(error, "failures", {}).values():  # of torch.distributed.checkpoint, by rank
        error = wrapped
    whole, _ = whole_in(output_dir)
    kept = f"{whole[max(whole)]} is the newest whole one" if whole else "there is no earlier one"
    lost = "what was trained after it is lost" if whole else "all that was trained is lost"
    there = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    free = shutil.disk_usage(there).free / 1e9  # torch's own errors do not say that the disk is full
    cause = (str(error).strip().splitlines() or [""])[0]
    return CheckpointError(
        f"{what} could not be written; {kept}, and {lost}. Is the disk full ({free:.3g} GB free), or a quota reached? "
        f"Remove the cause, then resume (--resume auto). The error was {type(error).__name__}: {cause}"
    )


def follow_changes(folder: Path) -> None:
    """Put the sizes of text files that callbacks have written again, once a checkpoint was saved, into its record."""
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        texts = [name for name in content["files"] if Path(name).suffix in _TEXT and (folder / name).is_file()]
        sizes = {name: (folder / name).stat().st_size for name in texts}
        changed = [name for name, size in sizes.items() if content["files"][name] != size]
        if changed:
            to_disk(folder / name for name in changed)
            Record(**{**content, "files": {**content["files"], **sizes}}).write(folder)
    except FileNotFoundError:
        return  # a model alone has no record; or somebody has taken the checkpoint away
    except OSError as error:
        logger.warning("%s was changed by a callback, and its record could not follow (%s)", folder, error)


def gather(value: Any) -> list[Any]:
    """A value of every rank, by rank. Returns on a rank only when every rank has called it."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    with explaining_lost_ranks(lambda: "a checkpoint"):
        dist.all_gather_object(values, value)
    return values


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings with another value now, as "name old -> new". A run without a setting has None for it."""
    now = json.loads(json.dumps(now))  # as it would be read back: lists for tuples
    return [f"{n} {before.get(n)} -> {now.get(n)}" for n in {**before, **now} if before.get(n) != now.get(n)]


def check_settings(folder: Path, record: Record, engine: str, fixed: dict[str, Any], free: dict[str, Any]) -> list[str]:
    """Settings of a run that differ from the checkpoint's and may.

    Raises:
        RefusedConfiguration: one differs that may not; names each, with its old and its new value.
    """
    different = changed(record.fixed, fixed)
    if different:
        raise RefusedConfiguration(
            f"{folder} was trained with other settings: {', '.join(different)}. Give the old values to go on with that "
            "run, or another --output_dir to start a new one"
        )
    if _SAME_FILES.get(record.engine, record.engine) != _SAME_FILES.get(engine, engine):
        raise RefusedConfiguration(
            f"{folder} was written on engine {record.engine}, and {engine} cannot read its optimizer state: go on with "
            f"{record.engine}, or choose another --output_dir to start a new run"
        )
    return changed({"engine": record.engine, **record.free}, {"engine": engine, **free})
