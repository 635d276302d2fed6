"""A sweep's definition, and the cells that it comes to: one run each."""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
import random
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from rose_ds.config import LOOKED_AT_BY, RoseConfig
from rose_ds.data.tasks import get_task
from rose_ds.experiments.cell_key import canonical, digest_of, known_by_content, with_leaves
from rose_ds.experiments.methods import Method, method_named
from rose_ds.experiments.presets import published
from rose_ds.experiments.settings import MethodSettings, RunSettings, constant_flag
from rose_ds.objectives import OBJECTIVES

Settings = Mapping[str, Any]

#: What a cell sets itself.
_OWN = ("task", "method", "seed", "output_dir", "resume", "resume_from_checkpoint", "objective_name", "strategy")
#: Where things lie on a machine: no part of what a cell is.
_PLACES = ("data",)
#: What says how own files are read.
_OF_FILES = ("train_file", "validation_file", "text_columns", "label_column", "drop_unlabelled", "file_encoding")


#: A cell's, where a sweep says nothing: it survives being killed, and is measured along its way.
_DEFAULTS = {
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 1,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "report_to": "none",
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: a method with its settings on a task under a seed."""

    task: str
    method: str
    seed: int
    settings: Settings
    """Flags of ``rose-ds train`` by name."""
    varied: Settings = field(default_factory=dict)
    """Those of them that the grid varies: what a choice is made among."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of the files among its settings, by the setting's name."""
    recorded: str | None = field(default=None, compare=False)
    """Its key, where it was read from a store, whose settings are portable ones."""

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits: the hash of all that the run's result depends on."""
        if self.recorded is not None:
            return self.recorded
        text = json.dumps([self.task, self.method, self.seed, canonical(self.portable)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def portable(self) -> dict[str, Any]:
        """Its settings without where things lie on one machine: of a file, its name and a digest of its content."""
        files = {name: f"{Path(self.settings[name]).name} {digest}" for name, digest in self.digests.items()}
        return {name: value for name, value in {**self.settings, **files}.items() if name not in _PLACES}

    @property
    def name(self) -> str:
        """For a person."""
        varied = "".join(f" {name}={value}" for name, value in self.varied.items())
        return f"{self.task} {self.method} seed {self.seed}{varied}"

    def flags(self, folder: Path) -> list[str]:
        """Arguments of ``rose-ds train``."""
        flags = ["--task", self.task, "--method", self.method, "--seed", str(self.seed)]
        flags += ["--output_dir", str(folder), "--resume", "auto"]
        return flags + _words({**_DEFAULTS, **self.settings})

    def source(self) -> list[str]:
        """Arguments that say where its dev set is, for commands that look at its finished run."""
        if not self.digests.keys() & {"train_file", "validation_file"}:
            return _words({name: self.settings[name] for name in _PLACES if name in self.settings})
        names = [name for name in _OF_FILES if name in self.settings]  # one given, nothing is taken from the run
        return ["--task", self.task, *_words({name: self.settings[name] for name in names})]


@dataclass(frozen=True)
class Sweep:
    """Methods x tasks x seeds x grid. What a method or task says goes before what all share."""

    methods: Mapping[str, Settings]
    """Name -> {settings, grid} of its own."""
    tasks: Mapping[str, Settings]
    """Name -> settings of its own."""
    seeds: Sequence[int] = (0,)
    settings: Settings = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] | str = field(default_factory=dict)
    """Flag -> values; or "published": each method's own search range (``rose_ds.experiments.methods``)."""
    budget: int | str | None = None
    """Settings that each method tries on a task: that many of its grid, drawn with a fixed seed. "full": whole grids,
    however unequal. None: whole grids, which must be equal.
    """

    @classmethod
    def read(cls, path: Path) -> dict[str, Any]:
        """The fields in a YAML file. Raises ValueError naming file, line and what is wrong."""
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        names = [f.name for f in fields(cls)]
        if not isinstance(content, dict) or set(content) - set(names):
            odd = sorted(map(str, set(content) - set(names))) if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path}: a sweep has the keys {', '.join(names)}; found {odd}")
        return content

    def __post_init__(self) -> None:
        for name in ("methods", "tasks"):  # a list of names is a mapping with nothing to say
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                value = dict.fromkeys(value)
            if not isinstance(value, Mapping) or not value:
                raise ValueError(f"{name}={value!r}: give names, e.g. {name}: [vanilla, rose-first]"[:300])
            object.__setattr__(self, name, {str(k): v or {} for k, v in value.items()})
        several = isinstance(self.seeds, Sequence) and self.seeds
        if not several or not all(type(s) is int and s >= 0 for s in self.seeds):
            raise ValueError(f"seeds={self.seeds!r} must be a list of integers >= 0")
        if not (self.budget in (None, "full") or (type(self.budget) is int and self.budget > 0)):
            raise ValueError(f'budget={self.budget!r} must be a number of settings, or "full"')
        if isinstance(self.grid, str) and self.grid != "published":
            raise ValueError(f'grid={self.grid!r} must be flags with values, or "published"')
        for name in ("methods", "tasks", "settings", "grid"):
            object.__setattr__(self, name, with_leaves(getattr(self, name), _number))
        for where, values in self._groups():
            if not isinstance(values, Mapping):
                raise ValueError(f"{where}: expected settings by name, found {values!r}"[:300])

    def check_names(self, known: Collection[str]) -> None:
        """Raises ValueError for a setting that is not among the flags of ``rose-ds train``, or is the sweep's own."""
        for where, values in self._groups():
            check_names(where, values, known)

    def _groups(self) -> Iterator[tuple[str, Any]]:
        yield from (("settings", self.settings), ("grid", self._shared_grid()))
        yield from ((f"tasks: {name}", own) for name, own in self.tasks.items())
        yield from self._of_methods()

    def _shared_grid(self) -> Mapping[str, Sequence[Any]]:
        return {} if isinstance(self.grid, str) else self.grid

    def _of_methods(self) -> Iterator[tuple[str, Any]]:
        for name, own in self.methods.items():
            method_named(name)
            if not isinstance(own, Mapping) or set(own) - {"settings", "grid"}:
                raise ValueError(f"methods: {name}: a method may have settings and grid, found {own!r}"[:300])
            for part in ("settings", "grid"):
                yield f"methods: {name}: {part}", own.get(part) or {}

    def cells(self) -> list[Cell]:
        """Every run; seeds innermost, then settings, methods, tasks.

        Raises:
            ValueError: a setting is bad, a file is not there, or the methods would not try equally many settings.
        """
        digest = functools.cache(digest_of)
        tried = {name: self._variants(method_named(name), own) for name, own in self.methods.items()}
        self._check_budget(tried)
        cells = []
        for task, of_task in self.tasks.items():
            for name, own in self.methods.items():
                method = method_named(name)
                general = {k: v for k, v in {**self.settings, **of_task}.items() if applies(k, method)}
                for varied in tried[name]:
                    settings = {**general, **(own.get("settings") or {}), **varied}
                    settings = {key: settings[key] for key in sorted(settings) if settings[key] is not None}
                    _check_values(name, task, settings)
                    digests = {flag: digest(place) for flag, place in known_by_content(settings).items()}
                    cells += [Cell(task, name, seed, settings, varied, digests) for seed in self.seeds]
        return cells

    def _variants(self, method: Method, own: Settings) -> list[Settings]:
        if self.grid == "published" and not own.get("grid"):
            axes = [list(axis) for axis in method.search]
        else:
            shared = {flag: v for flag, v in self._shared_grid().items() if applies(flag, method)}
            chosen = {**shared, **(own.get("grid") or {})}
            for flag, values in chosen.items():
                if not isinstance(values, (list, tuple)) or not values:
                    raise ValueError(f"grid: {flag}: expected a list of values, found {values!r}")
            axes = [[{flag: value} for value in values] for flag, values in chosen.items()]
        product: list[Settings] = [
            {k: v for part in parts for k, v in part.items()} for parts in itertools.product(*axes)
        ]
        if isinstance(self.budget, int) and self.budget < len(product):
            picked = random.Random("budget").sample(range(len(product)), self.budget)
            product = [product[i] for i in sorted(picked)]
        return product

    def _check_budget(self, tried: Mapping[str, Sequence[Settings]]) -> None:
        counts = {name: len(variants) for name, variants in tried.items()}
        if self.budget != "full" and len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(
                f"the methods would not try equally many settings ({listed}), and the one that tries more wins more: "
                f"set budget to at most {min(counts.values())}, widen the smaller grids, or say budget: full"
            )


def applies(flag: str, method: Method) -> bool:
    """Whether a setting that all methods share means something to this one."""
    strategy = method.rose["strategy"]
    for objective, constants in OBJECTIVES.items():
        if flag in {constant_flag(objective, f.name) for f in fields(constants)}:
            return objective == method.objective
    if flag not in RoseConfig.field_names():
        return True
    return strategy in LOOKED_AT_BY[flag] if flag in LOOKED_AT_BY else strategy != "none"


def check_names(where: str, values: Settings, known: Collection[str]) -> None:
    """Raises ValueError where a flag does not exist, or is the sweep's own business."""
    for name in values:
        if name in _OWN:
            raise ValueError(f"{where}: {name} is the sweep's to set: use methods, tasks and seeds")
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 3)
            raise ValueError(
                f"{where}: rose-ds train has no flag --{name}" + (f"; near it: {', '.join(near)}" if near else "")
            )


def _check_values(method: str, task: str, settings: Settings) -> None:
    """The values that need no model and no data to be found wrong, before the first run starts."""
    names = {f.name for f in fields(MethodSettings)}
    MethodSettings(method=method, **{k: v for k, v in settings.items() if k in names})
    names = {f.name for f in fields(RunSettings)}
    run = RunSettings(task=task, **{k: v for k, v in settings.items() if k in names})
    name = task if run.own_files else get_task(task).name
    if "preset" in settings:
        published(settings["preset"], method_named(method), name)


def _words(settings: Settings) -> list[str]:
    """Settings as the command line has them."""
    words = []
    for name, value in settings.items():
        several = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name}", *(_word(name, one) for one in several)]
    return words


def _word(name: str, value: Any) -> str:
    """A setting as the command line has it. YAML takes a bare no for False."""
    if value is False and name.endswith("_strategy"):
        return "no"
    if isinstance(value, Mapping):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


_EXPONENT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][+-]?[0-9]+|[+-]?[0-9]*\.[0-9]+")


def _number(value: Any) -> Any:
    """YAML takes 2e-4 for a text, for want of a point. Other texts stay: a column may be called 1."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
