"""``rose-ds attack``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

from rose_ds.cli import first_rank
from rose_ds.cli.arguments import OF_TRAINING, Parser
from rose_ds.experiments.settings import RunSettings

_DESCRIPTION = """Accuracy of a trained classifier under attack: misspellings searched for it, item by item.

Examples:
  rose-ds attack --model runs/sst2 --max_eval_samples 200
  rose-ds attack --model runs/mine --validation_file hard.csv --text_columns body --search pruthi --max_words 2
  torchrun --nproc_per_node 4 -m rose_ds attack --model runs/ensemble

Task, data and length are those of the model's run, unless flags say which rows to read.

Writes MODEL/attack/SEARCH-KEY.json, the accuracies, and SEARCH-KEY-RANK-of-WORLD.jsonl, every item with its edits
(elsewhere with --output_dir; KEY is of the limits and the rows); adds the accuracy to MODEL/metrics.json, for rose-ds
report. Started again it goes on where it was. A search that fails proves nothing: compare models under the same search,
limits, seed and items, and only with each other. ROSE's paper makes no automatic attacks."""
#: Of a round of questions: more of them hold more texts and lose more at a kill, fewer hold more padding.
_BATCHES = 20
_OF_OTHERS = ("adversarial_file", "engine", "max_train_samples", *OF_TRAINING)


@dataclass
class Output:
    """Where it goes, and how fast."""

    _argument_group_name: ClassVar[str] = "output"

    output_dir: str | None = field(default=None, metadata={"help": "Default: the folder attack in --model."})
    batch_size: int = field(default=64, metadata={"help": "Texts that the model is given at a time."})

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")


def run(arguments: Sequence[str]) -> None:
    """Attack, and print what was left."""
    from rose_ds.attack.settings import AttackSettings

    parser = Parser("attack", _DESCRIPTION, RunSettings, AttackSettings, Output)
    parser.refuse(
        _OF_OTHERS,
        "an attack reads the clean dev set, in one process or a torchrun job; give the rows to attack with "
        "--validation_file",
    )
    parser.require_model()
    parser.explain_trained()
    settings, how, output = parser.settings(arguments)
    given = parser.given(arguments)
    from tqdm import tqdm

    from rose_ds.attack.classifier import Classifier
    from rose_ds.attack.run import attack, summary
    from rose_ds.experiments.loading import load_data, settings_of
    from rose_ds.experiments.metrics import FILE as METRICS
    from rose_ds.experiments.metrics import Metrics, write_whole
    from rose_ds.experiments.models import label_names
    from rose_ds.experiments.resumable import all_ranks, digest, logs_of, rank_and_world

    settings = settings_of(settings.model, given)
    rank, world = rank_and_world()
    if output.output_dir is None and not Path(settings.model).is_dir():
        raise ValueError(f"--model {settings.model} is no folder to write to: give --output_dir")
    folder = Path(settings.model) / "attack" if output.output_dir is None else Path(output.output_dir)
    labels = label_names(settings.model) if settings.own_files else None
    data = load_data(settings, ("validation",), labels)
    assert data.validation is not None
    model = Classifier(settings.model, data.spec, max_length=settings.max_length, batch_size=output.batch_size)
    rows = [
        {"idx": row["idx"], "label": row["label"], "texts": tuple(row[name] for name in data.spec.fields)}
        for row in data.validation.select(range(rank, len(data.validation), world))
    ]
    items = digest(data.validation[name] for name in ("idx", "label", *data.spec.fields))
    logs = logs_of(folder, how.key(items), world)
    with (
        all_ranks(),
        tqdm(total=len(rows), desc=f"attack {how.search}", unit="item", disable=not first_rank()) as bar,
    ):
        subject = {"task": data.spec.name, "weights": model.fingerprint, "max_length": settings.max_length}
        subject["data"] = items
        at_once = _BATCHES * output.batch_size
        attack(rows, model.predict, how, logs[rank], subject=subject, at_once=at_once, progress=bar)
    if first_rank():
        found = {"task": data.spec.name, "model": settings.model, "rows": items, **asdict(how), **summary(logs)}
        path = folder / f"{how.key(items)}.json"
        write_whole(path, json.dumps(found, indent=2) + "\n")
        if output.output_dir is None and (Path(settings.model) / METRICS).is_file():
            metrics = Metrics.read(Path(settings.model))
            metrics.under_attack[how.label(found["items"], items)] = found["accuracy_under_attack"]
            metrics.write(Path(settings.model))
        right = found["items"] - found["wrong_before"]
        unsearched = f"; the query budget ended the search of {found['budget']}" if found["budget"] else ""
        ece = f" (ECE {100 * found['clean_ece']:.1f})" if found["clean_ece"] is not None else ""
        print(
            f"{data.spec.name} {how.search}: clean {found['clean_accuracy']:.2%}{ece}, under attack "
            f"{found['accuracy_under_attack']:.2%} ({found['broken']} of {right} right answers broken{unsearched})"
        )
        print("ROSE's paper makes no automatic attacks: none of its figures stands beside these")
        print(f"written: {path}, {', '.join(map(str, logs))}")
