"""``rose-ds sweep``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rose_ds.attack.searches import SEARCHES
from rose_ds.attack.settings import AttackSettings, PlannedAttack
from rose_ds.cli.arguments import HelpFormatter, Parser, RunArguments
from rose_ds.experiments.cells import Cell, Sweep
from rose_ds.experiments.launchers import LAUNCHERS
from rose_ds.experiments.settings import MethodSettings, RunSettings

_DESCRIPTION = """Methods x tasks x seeds x settings, each a run of rose-ds train that can be killed and goes on.

Examples:
  rose-ds sweep --store runs/small --methods vanilla rose-first --tasks snippets --seeds 0 1 2 --jobs 2 --max_steps 200
  rose-ds sweep --store runs/grid --methods vanilla rose-first --tasks sst2 --data glue/ --budget 4 \\
      --grid learning_rate=1e-5,2e-5,5e-5,1e-4 keep_first=0.4,0.6,0.8
  rose-ds sweep --store results/minilm --config results/minilm/sweep.yaml --data glue/ --jobs 2
  rose-ds sweep --store results/minilm --config results/minilm/sweep.yaml --status

Any flag of rose-ds train is a setting of every run (rose-ds train --help). Start the same command again, also on
another machine that sees the same folder, and what is left is done: a run that is under way is left to whom it belongs,
one that was killed goes on from its last checkpoint. A failed run is recorded with its log's last lines and stops
nothing. rose-ds report --store STORE makes tables of what is there.

A config file has the keys methods, tasks, seeds, settings, grid, budget (docs/experiments.md); flags overrule it."""


def run(arguments: Sequence[str]) -> None:
    """Run a sweep, or say how far it is."""
    options, rest = _parser().parse_known_args(arguments)
    train = Parser("sweep", _DESCRIPTION, RunSettings, MethodSettings, RunArguments)
    known = {name for settings in train.dataclass_types for name, f in settings.__dataclass_fields__.items() if f.init}
    flags = train.given(rest) if rest else {}
    sweep = _sweep(options, flags)
    sweep.check_names(known)
    cells = _cells(sweep, flags)
    from rose_ds.experiments.store import Status, Store
    from rose_ds.experiments.sweep import Runner, counts

    store = Store(options.store)
    attack = _attack(options)
    if not options.status:
        for data in dict.fromkeys(cell.settings.get("data") for cell in cells):
            if data and not Path(data).is_dir():
                raise ValueError(f"data={data!r} is not a folder")
        Runner(
            store,
            cells,
            jobs=options.jobs,
            launcher=options.launcher,
            launcher_args=shlex.split(options.launcher_args),
            retry_failed=options.retry_failed,
            keep_models=options.keep_models,
            attack=attack,
            halving=options.halving,
        ).run()
    found, results = counts(store, cells), store.results()
    print(f"{len(cells)} cells: " + ", ".join(f"{count} {name}" for name, count in found.items() if count))
    for cell in cells:
        if store.status(cell, results) is Status.FAILED:
            failure = store.failure(cell)
            print(f"failed (exit code {failure['exit_code']}): {cell.name}\n  log: {store.log(cell)}")
            print("\n".join(f"  | {line}" for line in failure["log"][-5:]))
    if found[Status.DONE.value] + found[Status.GIVEN_UP.value] < len(cells) and not options.status:
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rose-ds sweep",
        usage="%(prog)s --store DIR [--flag value ...]",
        description=_DESCRIPTION,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--store", type=Path, required=True, help="Folder of runs and results.jsonl; sweeps may share it.")
    add("--config", type=Path, help="YAML file with the sweep.")
    add("--methods", nargs="+", help="As --method of rose-ds train.")
    add("--tasks", nargs="+", help="As --task of rose-ds train.")
    add("--seeds", nargs="+", type=int, help="Default: 0, or the config's.")
    add(
        "--grid",
        nargs="+",
        metavar="FLAG=V,V",
        help="Settings to try for every method that knows them; or the word published: each method's own range.",
    )
    add("--budget", help="How many settings of the grid each method tries on a task; full: all, however unequal.")
    add(
        "--halving",
        type=int,
        metavar="N",
        help="Give up settings of a grid that are not among a method's best 1/N at their 1st, N-th, N*N-th ... "
        "evaluation, by clean accuracy under one seed (asynchronous successive halving; needs optuna).",
    )
    add("--jobs", type=int, default=1, help="Runs side by side on this machine; its cores are shared out among them.")
    add("--launcher", choices=list(LAUNCHERS), default="local", help="How a run is started.")
    add(
        "--launcher_args",
        default="",
        help='More words for it: --launcher_args="--num_gpus 2", or "--gres=gpu:1 --cpus-per-task=8 --mem=32G".',
    )
    add("--retry_failed", action="store_true", help="Try failed runs again.")
    add("--keep_models", action="store_true", help="Keep the trained models; otherwise they are deleted once measured.")
    add("--attack", choices=list(SEARCHES), help="Attack each trained model with this search; see rose-ds attack.")
    add("--attack_items", type=int, default=200, help="So many of the dev set are attacked, evenly spaced.")
    add("--attack_max_words", type=int, help="As --max_words of rose-ds attack.")
    add("--attack_query_budget", type=int, help="As --query_budget of rose-ds attack.")
    add("--attack_seed", type=int, default=0, help="As --attack_seed of rose-ds attack.")
    add("--status", action="store_true", help="Only say how far it is.")
    return parser


def _attack(options: argparse.Namespace) -> PlannedAttack | None:
    if options.attack is None:
        limits = ("attack_max_words", "attack_query_budget", "attack_seed")
        if any(getattr(options, name) for name in limits):
            raise ValueError(f"--{', --'.join(limits)} are of an attack: give --attack")
        return None
    how = AttackSettings(
        options.attack, options.attack_max_words, options.attack_query_budget, attack_seed=options.attack_seed
    )
    return PlannedAttack(how, options.attack_items)


def _sweep(options: argparse.Namespace, flags: dict[str, Any]) -> Sweep:
    content: dict[str, Any] = {} if options.config is None else Sweep.read(options.config)
    for name in ("methods", "tasks", "seeds"):
        chosen = getattr(options, name)
        if chosen is None:
            continue
        own = content.get(name)
        # a choice among the config's, whose own settings stay
        content[name] = {key: own.get(key) for key in chosen} if isinstance(own, dict) else chosen
    if options.grid is not None:
        content["grid"] = _grid(options.grid)
    if options.budget is not None:
        content["budget"] = int(options.budget) if options.budget.isdecimal() else options.budget
    for name in ("methods", "tasks"):
        if not content.get(name):
            raise ValueError(f"no {name}: give --{name}, or a --config that has them")
    content["settings"] = {**(content.get("settings") or {}), **flags}
    for name in flags:  # a flag goes before what the config says of a task or a method
        for own in content["tasks"].values() if isinstance(content["tasks"], dict) else ():
            (own or {}).pop(name, None)
        for own in content["methods"].values() if isinstance(content["methods"], dict) else ():
            if isinstance(own, dict):
                (own.get("settings") or {}).pop(name, None)
    return Sweep(**{name: value for name, value in content.items() if value is not None})


def _cells(sweep: Sweep, flags: Iterable[str]) -> list[Cell]:
    """Those of the sweep. Raises ValueError where a grid tries several values of what a flag sets to one."""
    cells = sweep.cells()
    for flag in flags:
        for cell in cells:
            if flag in cell.varied:
                raise ValueError(f"--{flag} is one value, and {cell.method}'s grid has its own: leave one of them out")
    return cells


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if text.lstrip("-").isdecimal() else text


def _grid(words: Sequence[str]) -> Any:
    if list(words) == ["published"]:
        return "published"
    grid = {}
    for word in words:
        flag, equals, values = word.partition("=")
        if not equals or not values:
            raise ValueError(f"--grid {word}: expected FLAG=VALUE,VALUE, e.g. learning_rate=1e-5,2e-5")
        grid[flag] = [_value(v) for v in values.split(",")]
    return grid
