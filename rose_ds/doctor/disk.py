"""The output folder: can it be written, is there room, and do all hosts see the same one."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from rose_ds.doctor.finding import Finding
from rose_ds.doctor.memory import GIB

#: Without a model to go by: metrics, logs and a small model.
_LITTLE = GIB


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.expanduser().absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def check_disk(output_dir: Path, checkpoint: int | None, model: int) -> list[Finding]:
    """Write a file where a run would, and compare the free space with what checkpoints need.

    Args:
        output_dir: may not be there yet.
        checkpoint: bytes of one checkpoint; None where no model is named.
        model: bytes of the trained model.
    """
    folder = existing(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        return [Finding("disk", "failed", f"{output_dir} is a file", "choose another --output_dir")]
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        mend = "choose another --output_dir, or make this one writable on every host"
        return [Finding("disk", "failed", f"{folder} cannot be written: {str(error.strerror).lower()}", mend)]
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free at {folder}"
    mend = (
        "free some, choose another --output_dir, or save less: --save_total_limit 1, or --save_strategy no, with which "
        "a run that is stopped begins anew"
    )
    if checkpoint is None:
        return [Finding("disk", "ok", text) if free > _LITTLE else Finding("disk", "warning", text, mend)]
    # a checkpoint is deleted only when a newer one is whole
    needed = 2 * checkpoint + model
    text += (
        f"; two checkpoints of {checkpoint / GIB:.2f} GiB and the model: {needed / GIB:.2f} GiB (--save_total_limit 1; "
        "without it all checkpoints stay)"
    )
    return [Finding("disk", "ok", text) if free > needed else Finding("disk", "failed", text, mend)]


def leave_mark(output_dir: Path) -> Path | None:
    """A file that the other ranks look for; None where it cannot be written."""
    try:
        with tempfile.NamedTemporaryFile(dir=existing(output_dir), prefix=".rose_ds-doctor-", delete=False) as file:
            return Path(file.name)
    except OSError:
        return None


def shared_or_not(seen: list[bool]) -> Finding:
    """Whether all ranks see rank 0's output folder. ``seen``: by rank."""
    blind = [rank for rank, saw in enumerate(seen) if not saw]
    if not blind:
        return Finding("shared output", "ok", "every rank sees rank 0's --output_dir")
    text = f"rank {', '.join(map(str, blind[:8]))}{', ...' * (len(blind) > 8)} does not see rank 0's --output_dir"
    mend = "checkpoints are written by all ranks: put --output_dir on a file system that every host mounts"
    return Finding("shared output", "failed", text, mend)
