"""``rose-ds landscape``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar

from rose_ds.analysis.landscape import Plane
from rose_ds.analysis.sharded import SHARDINGS, placed, start_ranks
from rose_ds.cli import first_rank
from rose_ds.cli.analyses import parse

logger = logging.getLogger(__name__)

_DESCRIPTION = """The loss around trained models in a plane of filter-normalised directions (Eq. 6), and how flat it is.

Examples:
  rose-ds landscape runs/vanilla runs/ensemble --output_dir figures
  rose-ds landscape runs/ensemble --points 15 --rows 128                       # a quick look
  torchrun --nproc_per_node 4 -m rose_ds landscape runs/vanilla runs/ensemble  # the points shared among ranks
  torchrun --nproc_per_node 4 -m rose_ds landscape runs/large --engine fsdp2   # the model sharded over ranks

Task, data and length are those of the models' runs. Writes landscape.json, .png, .svg and .html (which turns, and needs
no network); several models are drawn on one colour scale. Started again it goes on where it was."""


@dataclass
class Flatness:
    """Flatness in numbers."""

    _argument_group_name: ClassVar[str] = "flatness"

    split: str = field(default="train", metadata={"help": "train, validation, adversarial or perturbed."})
    delta: float = field(default=0.1, metadata={"help": "Area of the plane whose loss is below its minimum + delta."})
    rho: float = field(default=0.05, metadata={"help": "Length of SAM's step, for the sharpness."})
    eigenvalues: int | None = field(
        default=None,
        metadata={
            "help": "So many of the Hessian's largest eigenvalues, which take the longest. Default: 1; 0 if sharded."
        },
    )
    hessian_rows: int = field(default=64, metadata={"help": "Rows that the Hessian is of."})

    def __post_init__(self) -> None:
        if self.eigenvalues is not None and self.eigenvalues < 0:
            raise ValueError(f"eigenvalues={self.eigenvalues} must be at least 0")
        if self.hessian_rows < 1:
            raise ValueError(f"hessian_rows={self.hessian_rows} must be at least 1")


def run(arguments: Sequence[str]) -> None:
    """Measure, draw, and print the flatness."""
    models, given, (rows, plane, flat) = parse(
        "landscape",
        _DESCRIPTION,
        arguments,
        Plane,
        Flatness,
        models="folders of trained models, or hub ids",
        engines=tuple(SHARDINGS),
    )
    engine = given.get("engine", "auto")
    whole = engine not in SHARDINGS
    if flat.eigenvalues is None:
        flat.eigenvalues = int(whole)
    if flat.eigenvalues and not whole:
        raise ValueError(f"eigenvalues={flat.eigenvalues} are found of whole models: leave them out with {engine=}")
    from rose_ds.analysis import pictures
    from rose_ds.analysis.flatness import NotConverged, largest_eigenvalues, low_area, sharpness
    from rose_ds.analysis.landscape import gathered, surface
    from rose_ds.analysis.load import Batch, Opened, open_run, output_folder, same_data, splits_for, write_result
    from rose_ds.experiments.resumable import all_ranks, logs_of, rank_and_world

    start_ranks(engine)
    folder, world = output_folder(models, rows.output_dir), rank_and_world()[1]
    splits = splits_for(flat.split)
    opened: list[Opened] = [open_run(m, given, splits=splits, attention="eager", on_device=whole) for m in models]
    same_data(opened)
    kind = "landscape" if whole else f"landscape-{engine}"
    logs = {run.name: logs_of(folder / "points", f"{kind}-{n}", world) for n, run in enumerate(opened)}
    if len(logs) < len(opened):
        raise ValueError(f"two of the models have the same name, {[run.name for run in opened]}: rename a folder")
    batches = {run.name: run.batches(flat.split, rows.rows, rows.batch_size) for run in opened}
    with all_ranks():
        for run in opened:
            subject = {"name": run.name, "split": flat.split, "rows": rows.rows, **run.subject(flat.split)}
            with placed(run.model, engine, run.device) as model:
                surface(model, batches[run.name], plane, logs[run.name], subject)
    if not first_rank():
        return

    def eigenvalues(run: Opened, few: Sequence[Batch]) -> list[float]:
        try:
            return largest_eigenvalues(run.model, few, flat.eigenvalues) if flat.eigenvalues else []
        except NotConverged as error:  # the surface is there, and took as long
            logger.warning("%s: %s", run.name, error)
            return []

    found = {}
    for run in opened:
        measured = gathered(logs[run.name], plane.points)
        few = run.batches(flat.split, flat.hessian_rows, min(rows.batch_size, flat.hessian_rows))
        found[run.name] = {
            "model": run.settings.model,
            "loss_at_model": measured["loss"][plane.points // 2][plane.points // 2],
            "low_area": low_area(measured["loss"], flat.delta),
            "sam_sharpness": sharpness(run.model, batches[run.name], flat.rho) if whole else None,
            "hessian_eigenvalues": eigenvalues(run, few),
            **measured,
        }
    settings = {**asdict(rows), **asdict(plane), **asdict(flat), "task": opened[0].data.spec.name}
    written = [write_result(folder, "landscape", {"settings": settings, "steps": plane.steps(), "models": found})]
    written += pictures.landscape(found, plane.steps(), folder)
    print(_table(found, flat))
    print("written: " + ", ".join(map(str, written)))


def _table(found: dict[str, dict[str, object]], flat: Flatness) -> str:
    lines = [
        f"| model | loss | area below minimum + {flat.delta:g} | SAM sharpness, rho {flat.rho:g} | Hessian's largest |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, model in found.items():
        sharpness = "-" if model["sam_sharpness"] is None else f"{model['sam_sharpness']:.4f}"
        values = ", ".join(f"{value:.2f}" for value in model["hessian_eigenvalues"]) or "-"  # type: ignore[attr-defined]
        lines.append(f"| {name} | {model['loss_at_model']:.4f} | {model['low_area']:.1%} | {sharpness} | {values} |")
    return "\n".join(lines)
