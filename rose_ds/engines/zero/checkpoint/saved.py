"""What lies in a DeepSpeed checkpoint, read before anything of it is loaded."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    FP32_FLAT_GROUPS,
    LOSS_SCALER,
    OPTIMIZER_STATE_DICT,
    PARAM_SHAPES,
)

from rose_ds.errors import RefusedConfiguration

#: Under which ROSE's record lies in a checkpoint, beside DeepSpeed's own entries.
RECORD = "rose_ds"
#: What RoseAdamW keeps of each tensor.
STATES = ("step", "exp_avg", "exp_avg_sq")
#: How DeepSpeed lays a checkpoint out: replicated (stage 0), flat (stages 1 and 2), bf16 (BF16_Optimizer), stage3; or
#: universal, converted by its ds_to_universal: one folder of whole tensors for each parameter.
Layout = Literal["replicated", "flat", "bf16", "stage3", "universal"]

_OPTIMIZER_FILE = re.compile(r"(bf16_)?zero_pp_rank_\d+_mp_rank_00_optim_states\.pt")
_STAGE3_MODEL_FILE = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
#: What rank 0 reads at stages 0 to 2, and at stage 3.
MODEL_FILES = ("mp_rank_00_model_states.pt", _STAGE3_MODEL_FILE.format(0))


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk: the same on every rank, small enough to be sent around."""

    load_dir: Path
    tag: str
    layout: Layout
    precision: str
    world_size: int
    """Ranks that saved it."""
    model_files: tuple[Path, ...]
    optimizer_files: tuple[Path, ...]
    partitions: list[list[str]] | None
    """Names in each flat tensor, in order; None at stage 0."""
    shapes: dict[str, tuple[int, ...]]
    """Of the trainable parameters. At stage 0 without a record: of all entries of the model."""
    has_scheduler: bool
    record: dict[str, Any] | None

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self.load_dir / self.tag

    def check(self, rank: int, world_size: int) -> None:
        """Try to read this rank's share of the files, and those that this rank will load."""
        mine = {*self.model_files[rank::world_size], *self.optimizer_files[rank::world_size]}
        for files in (self.model_files, self.optimizer_files):
            mine |= {files[min(rank, len(files) - 1)]} if files else set()
        for path in mine:
            peek(path)
        if self.layout == "universal":
            for name in list(self.shapes)[rank::world_size]:
                for state in ("fp32", "exp_avg", "exp_avg_sq"):
                    peek(self.folder / "zero" / name / f"{state}.pt")


def peek(path: Path) -> Any:
    """A file's contents without reading its tensors, which stay on disk until they are used.

    Raises:
        RefusedConfiguration: the file is not there, or is not whole.
    """
    if not path.is_file():
        raise RefusedConfiguration(f"{path} is missing")
    try:
        return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=False)
    except Exception as error:  # whatever a damaged pickle raises
        raise RefusedConfiguration(
            f"{path} cannot be read, it may be truncated ({type(error).__name__}: {error})"
        ) from error


def find(load_dir: Path, tag: Any, prefer_universal: bool) -> Saved | None:
    """Look into ``load_dir``; None where no tag is given and there is no file ``latest``.

    Raises:
        RefusedConfiguration: what it should hold is not there.
    """
    if tag is None:
        tag = _latest(load_dir, prefer_universal)
        if tag is None:
            return None
    folder = load_dir / str(tag)
    if not folder.is_dir():
        raise RefusedConfiguration(f"{folder} is not a folder{_others(load_dir)}")
    model_files = model_files_of(folder)
    head = peek(model_files[0])
    world_size = int(head["dp_world_size"])
    optimizer_files: tuple[Path, ...] = ()
    layout: Layout = "replicated"
    if (folder / "zero").is_dir():
        layout = "universal"
        peek(folder / "zero" / "optimizer_state.pt")
    elif head[PARAM_SHAPES] is not None:
        optimizer_files = _optimizer_files(folder, world_size)
        if model_files[0].name != MODEL_FILES[0]:
            model_files = tuple(folder / _STAGE3_MODEL_FILE.format(rank) for rank in range(world_size))
        states = peek(optimizer_files[0])[OPTIMIZER_STATE_DICT]
        layout = "stage3" if FP32_FLAT_GROUPS in states else "flat" if LOSS_SCALER in states else "bf16"
        _check_states(optimizer_files[0], states[OPTIMIZER_STATE_DICT if layout == "stage3" else BASE_OPTIMIZER_STATE])
    elif head["optimizer"] is not None:
        _check_states(model_files[0], head["optimizer"].get(OPTIMIZER_STATE_DICT, head["optimizer"]))
    record = head.get(RECORD)
    partitions = None if head[PARAM_SHAPES] is None else [list(shapes) for shapes in head[PARAM_SHAPES]]
    return Saved(
        load_dir,
        str(tag),
        layout,
        _precision(head.get("ds_config") or {}),
        world_size,
        model_files,
        optimizer_files,
        partitions,
        record["shapes"] if record else _shapes(head),
        head["lr_scheduler"] is not None,
        record,
    )


def _latest(load_dir: Path, prefer_universal: bool) -> str | None:
    for name in ("latest_universal", "latest") if prefer_universal else ("latest",):
        path = load_dir / name
        if path.is_file():
            tag = path.read_text().strip()
            if not tag:
                raise RefusedConfiguration(f"{path} is empty{_others(load_dir)}")
            if not (load_dir / tag).is_dir():
                raise RefusedConfiguration(f"{path} names {tag!r}, which is not there{_others(load_dir)}")
            return tag
    return None


def _others(load_dir: Path) -> str:
    there = sorted(path.parent.name for path in load_dir.glob("*/*model_states.pt"))
    return f"; load_checkpoint(..., tag=) can name one of {sorted(set(there))}" if there else ""


def model_files_of(folder: Path) -> tuple[Path, ...]:
    """The files with the model's own entries that are there; first the one that holds most."""
    sharded = list(folder.glob(_STAGE3_MODEL_FILE.format("*")))
    sharded.sort(key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])
    files = [path for path in (folder / MODEL_FILES[0], *sharded) if path.is_file()]
    if not files:
        raise RefusedConfiguration(f"{folder / MODEL_FILES[0]} is missing (at ZeRO-3: {MODEL_FILES[1]})")
    if sharded and files[0].name == MODEL_FILES[0]:  # a universal checkpoint, one of them without the model
        files.sort(key=lambda path: not peek(path)["module"])
    return tuple(files)


def _optimizer_files(folder: Path, world_size: int) -> tuple[Path, ...]:
    found = [match for match in (_OPTIMIZER_FILE.fullmatch(path.name) for path in folder.iterdir()) if match]
    prefix = found[0].group(1) or "" if found else ""
    return tuple(folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world_size))


def _check_states(path: Path, optimizer: Any) -> None:
    states = optimizer["state"] if isinstance(optimizer, dict) else dict(enumerate(optimizer))
    for state in states.values():
        missing = [name for name in STATES if name not in state]
        if missing:
            raise RefusedConfiguration(
                f"{path} has no {missing} among its optimizer states {sorted(state)}: another optimizer than RoseAdamW "
                "or torch's AdamW wrote it. load_optimizer_states=False loads the weights alone"
            )


def _precision(ds_config: dict[str, Any]) -> str:
    for name, section in (("bf16", "bf16"), ("bf16", "bfloat16"), ("fp16", "fp16")):
        if ds_config.get(section, {}).get("enabled") is True:
            return name
    return "fp32"


def _shapes(head: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    parts = [head["module"]] if head[PARAM_SHAPES] is None else head[PARAM_SHAPES]
    return {
        name: tuple(getattr(value, "shape", value))
        for part in parts
        for name, value in part.items()
        if value is not None
    }
