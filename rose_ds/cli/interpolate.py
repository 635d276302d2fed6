"""``rose-ds interpolate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rose_ds.analysis.interpolation import Line
from rose_ds.analysis.sharded import SHARDINGS, placed, start_ranks
from rose_ds.cli import first_rank
from rose_ds.cli.analyses import parse

_DESCRIPTION = """Loss and accuracy on the line between two models (Eq. 7), on clean, adversarial and perturbed text.

Examples:
  rose-ds interpolate runs/ensemble runs/vanilla --output_dir figures
  rose-ds interpolate runs/ensemble runs/vanilla --points 9 --rows 128     # a quick look

a = 0 is the first model, a = 1 the second. Writes interpolation.json, .png and .svg. Started again it goes
on where it was; under a launcher the points are shared among ranks, or with --engine fsdp2 or zero3 the models."""


def run(arguments: Sequence[str]) -> None:
    """Measure, draw, and print the models' accuracies."""
    models, given, (rows, line) = parse(
        "interpolate",
        _DESCRIPTION,
        arguments,
        Line,
        models="two folders of trained models, or hub ids",
        engines=tuple(SHARDINGS),
    )
    engine = given.get("engine", "auto")
    if len(models) != 2:
        raise ValueError(f"a line has two ends: give two models, found {len(models)}")
    from rose_ds.analysis import pictures
    from rose_ds.analysis.directions import weights_of
    from rose_ds.analysis.interpolation import same_architecture, walk
    from rose_ds.analysis.load import open_run, output_folder, same_data, write_result
    from rose_ds.experiments.models import label_order
    from rose_ds.experiments.resumable import all_ranks, logs_of, rank_and_world, records_of

    start_ranks(engine)
    whole = engine not in SHARDINGS
    folder, world = output_folder(models, rows.output_dir), rank_and_world()[1]
    one, other = (open_run(m, given, splits=("validation", "adversarial"), on_device=whole) for m in models)
    same_data([one, other])
    same_architecture(one.model, other.model)
    if label_order(one.model.config, one.data.spec) != label_order(other.model.config, one.data.spec):
        raise ValueError(
            f"{one.name} and {other.name} number the labels differently, so the line between their heads would mix two "
            "labels: take models that were trained from one checkpoint"
        )
    names = ("validation", "perturbed", *(["adversarial"] if one.data.adversarial is not None else []))
    sets = {name: one.batches(name, rows.rows, rows.batch_size) for name in names}
    logs = logs_of(folder / "points", "interpolation" if whole else f"interpolation-{engine}", world)
    ends = one.subject(*names), other.subject()
    subject = {**ends[0], "rows": rows.rows, "weights": [end["weights"] for end in ends]}
    with all_ranks():
        with placed(other.model, engine, other.device) as model:
            last = weights_of(model)
        with placed(one.model, engine, one.device) as model:
            walk(model, last, sets, line, logs, subject)
    if not first_rank():
        return
    points = [record for _, record in sorted({r["point"]: r for r in records_of(logs)}.items())]
    settings = {**asdict(rows), **asdict(line), "task": one.data.spec.name, "models": models}
    written = [write_result(folder, "interpolation", {"settings": settings, "points": points})]
    written += pictures.interpolation(points, list(sets), (one.name, other.name), folder)
    models_on_line = [p for p in points if p["a"] in (0, 1)]
    told = models_on_line if len(models_on_line) == 2 else [points[0], points[-1]]
    for name in sets:
        best = max(points, key=lambda p: (p[f"{name}_accuracy"], -p[f"{name}_loss"]))
        shown = ", ".join(f"{p[f'{name}_accuracy']:.2%} at a = {p['a']:g}" for p in told)
        print(f"{name}: {shown}; highest {best[f'{name}_accuracy']:.2%} at a = {best['a']:g}")
    print("written: " + ", ".join(map(str, written)))
