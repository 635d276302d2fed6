"""``rose-ds bench``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from rose_ds.cli.arguments import OF_TRAINING, Parser
from rose_ds.experiments.methods import METHODS, method_named
from rose_ds.experiments.settings import RunSettings

_COMBINATIONS = ("r-drop+rose-first", "smart+rose-second", "freelb+rose-ensemble")
#: Behind a method: another way to find first-order risk.
_MODES = (", fast", ", halves")

_DESCRIPTION = """What each method's training step costs beside AdamW's on this machine: seconds and peak memory.

Examples:
  rose-ds bench --methods rose-second rose-ensemble "rose-ensemble, fast"
  rose-ds bench --task sst2 --data glue/ --model roberta-base --batch_size 32 --methods rose-ensemble r-drop
  rose-ds bench --output cost.json --plot cost.png                                    # every method
  rose-ds bench --engine zero3 --ranks 8 --bf16 --model roberta-large --methods rose-ensemble "rose-ensemble, fast"
  rose-ds bench --gradient_accumulation_steps 2 --methods "rose-ensemble, halves"

All methods take turns, a step each in every round, so that a busy moment of the machine meets all alike; printed is the
median of a round's ratio to AdamW (vanilla) with its quartiles, beside what arithmetic says. ", fast" or ", halves"
behind a method: with that --first_order. A step is forward and backward passes of one batch, clipping and update. All
models are in memory at once, and on several ranks each method has a process for each (of this machine)."""


@dataclass
class Rounds:
    """What is measured, and how."""

    _argument_group_name: ClassVar[str] = "measurement"

    methods: list[str] | None = field(
        default=None,
        metadata={"help": "Methods and combinations, as rose-ds train has them. Default: every one."},
    )
    batch_size: int = field(default=16, metadata={"help": "Rows of a step, on each rank."})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Take them in so many micro-batches, for all methods alike."}
    )
    ranks: int = field(default=1, metadata={"help": "Processes of each method, for every --engine but plain."})
    bf16: bool = field(default=False, metadata={"help": "Passes in bf16, weights in fp32."})
    rounds: int = field(default=12, metadata={"help": "Steps of each method that count."})
    warmup: int = field(default=3, metadata={"help": "Steps before them that do not."})
    threads: int = field(default=2, metadata={"help": "CPU threads of each process."})
    output: str | None = field(default=None, metadata={"help": "Write everything that was found to this JSON file."})
    plot: str | None = field(default=None, metadata={"help": "Draw it: .png, .pdf or .svg."})

    def __post_init__(self) -> None:
        at_least = {
            "batch_size": 1,
            "gradient_accumulation_steps": 1,
            "ranks": 1,
            "rounds": 2,
            "warmup": 0,
            "threads": 1,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of {self.gradient_accumulation_steps} micro-batches "
                "(gradient_accumulation_steps)"
            )
        for method in self.methods or ():
            mode = next((mode for mode in _MODES if method.endswith(mode)), "")
            found = method_named(method.removesuffix(mode))
            if mode and found.rose.get("strategy") not in ("first", "ensemble"):
                raise ValueError(f"{method!r}: only methods that rank by first-order risk have a {mode[2:]} mode")
            if mode == ", halves" and self.gradient_accumulation_steps == 1:
                raise ValueError(f"{method!r} compares micro-batches: add --gradient_accumulation_steps 2")
        for name in ("output", "plot"):
            path = getattr(self, name)
            if path is not None and not Path(path).absolute().parent.is_dir():
                raise ValueError(f"--{name} {path}: there is no folder {Path(path).absolute().parent}")
        if self.plot is not None and Path(self.plot).suffix not in (".png", ".pdf", ".svg"):
            raise ValueError(f"--plot {self.plot} must end in .png, .pdf or .svg")
        if self.plot is not None and find_spec("matplotlib") is None:
            raise ValueError("--plot draws with matplotlib: pip install 'rose_ds[analysis]'")

    @property
    def chosen(self) -> list[str]:
        """The methods to measure."""
        modes = _MODES[: 1 + (self.gradient_accumulation_steps > 1)]
        cheaper = [f"{name}{mode}" for mode in modes for name in ("rose-first", "rose-ensemble")]
        return self.methods or [*METHODS, *cheaper, *_COMBINATIONS]

    def engine(self, asked: str) -> str:
        """The one to measure."""
        from rose_ds.experiments.cost.engines import MEASURED

        engine = ("plain" if self.ranks == 1 else "ddp") if asked == "auto" else asked
        if engine not in MEASURED:
            raise ValueError(f"engine={engine!r} cannot be measured; those that can are {', '.join(MEASURED)}")
        if engine == "plain" and self.ranks > 1:
            raise ValueError("engine='plain' is one process: choose another --engine for --ranks above 1")
        return engine


def run(arguments: Sequence[str]) -> None:
    """Measure, write, print."""
    from rose_ds.experiments.cost.engines import MEASURED

    parser = Parser("bench", _DESCRIPTION, RunSettings, Rounds)
    parser.explain("engine", f"What to measure on: {', '.join(MEASURED)}. Default: plain, or ddp for --ranks above 1.")
    parser.refuse(OF_TRAINING, "a measured step records nothing; leave it out")
    settings, how = parser.settings(arguments)
    engine = how.engine(settings.engine)
    from tqdm import tqdm

    from rose_ds.experiments.cost.turns import measure, plot, table
    from rose_ds.experiments.loading import load_data
    from rose_ds.experiments.metrics import write_whole
    from rose_ds.experiments.models import check_length, load_tokenizer

    data = load_data(settings, splits=("train",))  # says what is wrong with it once, and not in every process
    if data.train is None or len(data.train) < how.batch_size * how.ranks:
        raise ValueError(f"batch_size={how.batch_size}: the training set has {len(data.train or ())} rows")
    check_length(settings.model, load_tokenizer(settings.model), settings.max_length)

    def progress(items: Iterable[Any], text: str) -> Iterable[Any]:
        return tqdm(items, desc=text)

    job = {
        "run": {**asdict(settings), "engine": "auto"},
        "engine": engine,
        "ranks": how.ranks,
        "bf16": how.bf16,
        "batch_size": how.batch_size,
        "accumulation": how.gradient_accumulation_steps,
        "threads": how.threads,
    }
    found = measure(how.chosen, job, rounds=how.rounds, warmup=how.warmup, progress=progress)
    found = {"command": shlex.join(["rose-ds", "bench", *arguments]), **found}
    if how.output is not None:
        write_whole(Path(how.output), json.dumps(found, indent=1) + "\n")
    print(table(found["methods"]))
    if how.plot is not None:
        plot(found["methods"], Path(how.plot))
