"""What a method keeps over a whole run beside weights and moments: a mask found once, an average of the weights or of
risks.

Written by slices, each with its place in the named tensor, so that any number of ranks and any engine can read it.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rose_ds.core.layout import Block
from rose_ds.core.select import Selection
from rose_ds.core.threshold import Threshold
from rose_ds.engines.average import WeightAverage
from rose_ds.engines.base import Engine
from rose_ds.errors import RefusedConfiguration
from rose_ds.optimizer import Slice
from rose_ds.training.checkpoints import gather
from rose_ds.training.risk_average import RiskAverage

_VERSION = 1
_NAME = "rose_state-{rank:05d}-of-{world:05d}.pt"
_PATTERN = re.compile(r"rose_state-(\d{5})-of-(\d{5})\.pt")


class MethodState:
    """A run's; empty for methods that keep nothing. ``save`` and ``load`` are called by every rank."""

    def __init__(
        self, engine: Engine, *, keeps_mask: bool, keeps_average: bool, risk: RiskAverage | None = None
    ) -> None:
        self.engine, self.keeps_mask, self.keeps_average = engine, keeps_mask, keeps_average
        self.risk = risk
        """First-order risk that outlives a step, where a method keeps it."""
        self.selection: Selection | None = None
        """The mask of a policy that refreshes once."""
        self.average: WeightAverage | None = None
        self._begun = not self.keeps_something
        """Whether the run was seen to begin here, or what it keeps was loaded."""

    @property
    def keeps_something(self) -> bool:
        """Whether a checkpoint must hold anything."""
        return self.keeps_mask or self.keeps_average or self.risk is not None

    def refuse_own_folders(self, setting: str) -> None:
        """Under a setting that has each host keep to itself what its ranks write. Every rank calls it.

        Raises:
            RefusedConfiguration: there are several hosts, and the method keeps what each rank must read of all.
        """
        if self.keeps_something and len(set(gather(socket.gethostname()))) > 1:
            raise RefusedConfiguration(
                f"{setting} leaves each host the files of its own ranks, and no run could go on from them: what this "
                "method keeps (a mask found once, an average of the weights or of risks) is read by every rank from "
                "all ranks' files; switch it off and save to a folder that all hosts share"
            )

    def save(self, folder: Path) -> None:
        """Write this rank's file; none where there is nothing to keep, or another rank holds the same."""
        rank, world = _rank_and_world()
        if self.engine.replicated:
            rank, world = (0, 1) if rank == 0 else (-1, 1)
        found: dict[str, Any] = {"version": _VERSION, "strategy": self.engine.optimizer.config.strategy}
        found["begun"] = self._would_have_begun()
        if self.selection is not None:
            found["thresholds"] = {bit: asdict(t) for bit, t in self.selection.thresholds.items()}
            found["mask"] = _described(self.engine.slices, _as_tensors(self.selection, self.engine.slices))
        if self.average is not None:
            found["average"] = _described(self.average.slices, self.average.values)
        if self.risk is not None and self.risk.values is not None:
            found["risk"] = _described(self.engine.slices, self.risk.values)
        if not self.keeps_something or rank < 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _NAME.format(rank=rank, world=world)
        temporary = path.with_suffix(".partial")
        torch.save(found, temporary)
        temporary.replace(path)
        if rank == 0:  # a folder that is written again holds those of the last time, of more or fewer ranks
            for old in folder.glob("rose_state-*.pt"):
                match = _PATTERN.fullmatch(old.name)
                if match and int(match[2]) != world:
                    old.unlink()

    def require(self, folder: Path, *, converted: bool) -> None:
        """Before a checkpoint is loaded; ``converted``: by somebody, to a universal one.

        Raises:
            RefusedConfiguration: the method keeps something and the folder does not have it.
        """
        if not self.keeps_something:
            return
        files = _files_in(folder)
        if files:
            part = torch.load(files[0], map_location="cpu", weights_only=True, mmap=True)
            self._check_whole(folder, part)
        elif converted:
            raise RefusedConfiguration(
                f"{folder} has no rose_state files, which hold what this method keeps over a run, and ds_to_universal "
                "does not copy them: copy rose_state-*.pt from the checkpoint that was converted into this folder"
            )
        else:
            raise self._missing(folder)

    def _check_strategy(self, folder: Path, part: Mapping[str, Any]) -> None:
        strategy = self.engine.optimizer.config.strategy
        if self.keeps_mask and part["strategy"] != strategy:
            raise RefusedConfiguration(f"{folder} was trained with strategy={part['strategy']!r}, not {strategy!r}")

    def _check_whole(self, folder: Path, part: Mapping[str, Any]) -> None:
        """Whether it is the state of a method that keeps what this one does, as far as it had got."""
        self._check_strategy(folder, part)
        wanted = {"mask": self.keeps_mask, "risk": self.risk is not None, "average": self.keeps_average}
        there = [name for name in wanted if name in part]
        begun = part.get("begun")
        if begun is None:  # of before it was written: something of another kind alone tells
            begun = dict.fromkeys(wanted, bool(there) and not any(wanted[name] for name in there))
        missing = [name for name in wanted if wanted[name] and begun[name] and name not in there]
        if missing:
            raise RefusedConfiguration(
                f"{folder} has rose_state files without the {' and the '.join(missing)} that this method keeps: they "
                "are of another method; resume with the one it was trained with"
            )

    def _would_have_begun(self) -> dict[str, bool]:
        """What a method would keep by now, if it kept it."""
        taken, config = self.engine.optimizer.steps_taken(), self.engine.optimizer.config
        ranked = taken > config.mask_warmup_steps
        # a step of one micro-batch has no halves to find a risk from
        return {"mask": ranked, "risk": ranked and config.first_order != "halves", "average": taken > 0}

    @staticmethod
    def _missing(folder: Path) -> RefusedConfiguration:
        return RefusedConfiguration(
            f"{folder} has no rose_state files: it was written without what this method keeps over a run (a mask "
            "found once, an average of the weights or of risks); resume with the method it was trained with"
        )

    def check(self) -> None:
        """Before a step.

        Raises:
            RefusedConfiguration: the optimizer has taken steps that this has not seen, and nothing was loaded.
        """
        if self._begun:
            return
        taken = self.engine.optimizer.steps_taken()
        if taken > 0 and self.selection is None:
            raise RefusedConfiguration(
                f"{taken} optimizer steps were taken, and what this method keeps over a run (a mask found once, an "
                "average of the weights or of risks) was not loaded: call stepper.load_state() with the checkpoint's "
                "folder once weights and optimizer are loaded (rose_ds.prepare(engine) and then "
                "engine.load_checkpoint() do), or begin with a new optimizer"
            )
        self._begun = True

    def forget(self) -> None:
        """What a run that begins anew, or goes on from another place, must not have."""
        self.selection = self.average = None
        if self.risk is not None:
            self.risk.values = None

    def load(self, folder: Path) -> None:
        """Read what belongs to this rank's slices.

        Raises:
            RefusedConfiguration: the method keeps something and the folder does not have it, whole.
        """
        if not self.keeps_something:
            return
        self.forget()
        self.engine.agree_on_steps()
        files = _files_in(folder)
        if not files:
            if self.engine.optimizer.steps_taken() == 0:
                return  # saved before the method had anything to keep
            raise self._missing(folder)
        parts = [torch.load(path, map_location="cpu", weights_only=True, mmap=True) for path in files]
        self._check_whole(folder, parts[0])
        if self.keeps_mask and "mask" in parts[0]:
            codes = _collect(folder, [part["mask"] for part in parts], self.engine.slices, torch.uint8)
            thresholds = {bit: Threshold(**_as_threshold(t)) for bit, t in parts[0]["thresholds"].items()}
            per_tensor = self.engine.optimizer.config.granularity == "tensor"
            self.selection = Selection([int(code[0]) for code in codes] if per_tensor else codes, thresholds)
        if self.risk is not None and "risk" in parts[0]:
            risks = _collect(folder, [part["risk"] for part in parts], self.engine.slices, torch.float32)
            self.risk.values = risks
        if self.keeps_average and "average" in parts[0]:
            average = WeightAverage(self.engine)
            average.values = _collect(folder, [part["average"] for part in parts], average.slices, torch.float32)
            self.average = average
        self._begun = True

    def take_over(self, other: MethodState) -> None:
        """What an earlier stepper of the same optimizer and parameters has kept."""
        self.selection = other.selection
        if self.risk is not None and other.risk is not None:
            self.risk.values = other.risk.values
        if other.average is not None:
            self.average = WeightAverage(self.engine)
            self.average.values = other.average.values
        self._begun = True


def _rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _files_in(folder: Path) -> list[Path]:
    """Every rank's file, of the newest set that is whole."""
    sets: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("rose_state-*.pt")):
        match = _PATTERN.fullmatch(path.name)
        if match:
            sets.setdefault(int(match[2]), []).append(path)
    for world, paths in sets.items():
        if len(paths) != world:
            raise RefusedConfiguration(f"{folder} has {len(paths)} of {world} rose_state files: not written to its end")
    if len(sets) > 1:
        raise RefusedConfiguration(f"{folder} has rose_state files of {sorted(sets)} ranks: of several checkpoints")
    return next(iter(sets.values()), [])


def _described(slices: Sequence[Slice], values: Sequence[Tensor]) -> list[tuple[str, tuple[Any, ...], Tensor]]:
    return [
        (piece.name, (piece.block.shape, piece.block.start, piece.block.extent), value.cpu())
        for piece, value in zip(slices, values, strict=True)
    ]


def _as_tensors(selection: Selection, slices: Sequence[Slice]) -> list[Tensor]:
    """Codes by element, also where there is one for a whole tensor: a slice of it elsewhere has the same."""
    return [
        code if isinstance(code, Tensor) else torch.full((piece.numel,), int(code), dtype=torch.uint8)
        for code, piece in zip(list[Any](selection.codes), slices, strict=True)
    ]


def _collect(folder: Path, parts: Sequence[Any], slices: Sequence[Slice], dtype: torch.dtype) -> list[Tensor]:
    saved: dict[str, list[tuple[Block, Tensor]]] = {}
    for part in parts:
        for name, (shape, start, extent), value in part:
            saved.setdefault(name, []).append((Block(tuple(shape), tuple(start), tuple(extent)), value))
    collected = []
    for piece in slices:  # one named tensor at a time is held whole
        count = torch.Size(piece.block.shape).numel()
        whole, covered = torch.zeros(count, dtype=dtype), torch.zeros(count, dtype=torch.bool)
        for block, value in saved.get(piece.name, []):
            if torch.Size(block.shape).numel() != count:
                raise RefusedConfiguration(f"{folder} has a {piece.name!r} of shape {block.shape}: another model's")
            at = block.positions()
            whole[at], covered[at] = value.to(dtype), True
        mine = piece.block.positions()
        if not covered[mine].all():
            raise RefusedConfiguration(f"{folder} lacks elements of {piece.name!r}: another model, or other patterns")
        collected.append(whole[mine].to(piece.param.device))
    return collected


def _as_threshold(fields: dict[str, Any]) -> dict[str, Any]:
    rows = fields["kept_per_rank"]
    return {**fields, "kept_per_rank": None if rows is None else tuple(rows)}
