"""``rose-ds probe``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import ClassVar

from rose_ds.analysis.msgs import PARADIGMS
from rose_ds.analysis.probing import Training
from rose_ds.cli import first_rank
from rose_ds.cli.analyses import add_models
from rose_ds.cli.arguments import Parser

_DESCRIPTION = """Does a fine-tuned model prefer syntax or the surface? (Section 4.2, Figure 3)

Examples:
  rose-ds probe runs/vanilla runs/ensemble --msgs MSGS/ --output_dir figures
  rose-ds probe runs/vanilla runs/ensemble --seeds 0 1 --train_items 300    # a quick look, with sentences made here

Each model gets a new head and is trained on items in which a linguistic feature (control or raising) and a surface
feature ("the" is there; 16 words or more) agree; items in which they differ show which one it learned: the Matthews
correlation with the linguistic label is 1 for syntax and -1 for the surface. Writes probing.json, .png and .svg.
Started again it goes on where it was; under a launcher models, features and seeds are shared among ranks."""


@dataclass
class Probing:
    """Which items, and where the results go."""

    _argument_group_name: ClassVar[str] = "items and output"

    msgs: str | None = field(
        default=None, metadata={"help": "Folder in the layout of MSGS. Default: simpler sentences, made here."}
    )
    surface: list[str] = field(
        default_factory=lambda: list(PARADIGMS), metadata={"help": f"Surface features: {', '.join(PARADIGMS)}."}
    )
    item_seed: int = field(default=0, metadata={"help": "Seed of the sentences that are made here."})
    output_dir: str | None = field(default=None, metadata={"help": "Default: the folder analysis in the first model."})

    def __post_init__(self) -> None:
        unknown = sorted(set(self.surface) - set(PARADIGMS))
        if unknown or not self.surface:
            raise ValueError(f"surface={self.surface} must be of {list(PARADIGMS)}")


def run(arguments: Sequence[str]) -> None:
    """Train, measure, draw, print."""
    parser = Parser("probe", _DESCRIPTION, Probing, Training)
    add_models(parser, "folders of models, or hub ids")
    parser.parse_args(arguments)
    what, how, rest = parser.parse_args_into_dataclasses(list(arguments), look_for_args_file=False)
    models: list[str] = rest.models
    from tqdm import tqdm

    from rose_ds.analysis import pictures
    from rose_ds.analysis.load import fresh_classifier, output_folder, write_result
    from rose_ds.analysis.msgs import probes
    from rose_ds.analysis.probing import linguistic_bias
    from rose_ds.experiments.models import weights_digest
    from rose_ds.experiments.resumable import ResumableLog, all_ranks, digest, logs_of, rank_and_world, records_of

    names = [Path(model).name for model in models]
    if len(set(names)) < len(names):
        raise ValueError(f"two of the models have the same name, {names}: rename a folder")
    folder, (rank, world) = output_folder(models, what.output_dir), rank_and_world()
    logs = logs_of(folder / "points", "probing", world)
    work = [(m, s, seed) for seed in how.seeds for s in what.surface for m in range(len(models))][rank::world]
    settings = {**asdict(what), **asdict(how), "models": models}
    fixed = {name: value for name, value in settings.items() if name != "output_dir"}
    fixed["weights"] = [weights_digest(model) for model in models]
    msgs, counts = None if what.msgs is None else Path(what.msgs), (how.train_items, how.test_items)
    items = {surface: probes(surface, msgs, counts, what.item_seed) for surface in what.surface}
    fixed["items"] = {name: digest([*map(astuple, part)] for part in parts) for name, parts in items.items()}
    with all_ranks(), ResumableLog(logs[rank], fixed) as log:
        done = {(r["model"], r["surface"], r["seed"]) for r in log.records}
        for m, surface, seed in tqdm(work, desc="probe", unit="run", disable=not first_rank()):
            if (names[m], surface, seed) in done:
                continue
            model, tokenizer = fresh_classifier(models[m], seed)
            found = linguistic_bias(model, tokenizer, *items[surface], how, seed)
            log.append({"model": names[m], "surface": surface, "seed": seed, **found})
    if not first_rank():
        return
    records = sorted(records_of(logs), key=lambda r: (names.index(r["model"]), r["surface"], r["seed"]))
    values = {
        name: {s: [r["mcc"] for r in records if (r["model"], r["surface"]) == (name, s)] for s in what.surface}
        for name in names
    }
    written = [write_result(folder, "probing", {"settings": settings, "runs": records})]
    title = "1: by syntax, -1: by the surface; a dot a seed"
    written += pictures.strips(values, "Matthews correlation", title, folder / "probing", (-1.05, 1.05))
    print("| model | surface | Matthews correlation | by seed | training accuracy |\n| --- | --- | --- | --- | --- |")
    for name in names:
        for surface in what.surface:
            trained = [r["train_accuracy"] for r in records if (r["model"], r["surface"]) == (name, surface)]
            seeds = ", ".join(f"{value:.2f}" for value in values[name][surface])
            mean = statistics.fmean(values[name][surface])
            print(f"| {name} | {surface} | {mean:.3f} | {seeds} | {statistics.fmean(trained):.1%} |")
    print("written: " + ", ".join(map(str, written)))
