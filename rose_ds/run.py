"""Run a transformers Trainer script that knows nothing of ROSE, with ROSE.

    python -m rose_ds.run [--rose key=value ...] script.py [the script's arguments]
    deepspeed --module rose_ds.run script.py ...
    accelerate launch -m rose_ds.run script.py ...

While the script runs, transformers.Trainer is RoseTrainer. Settings come from --rose, or from the RoseAdamW optimizer
block of the script's own DeepSpeed config: RoseConfig's fields, objective=NAME (task, r-drop, smart, freelb) and that
objective's constants by their names.

    python -m rose_ds.run --rose strategy=first keep_first=0.7 script.py ...
    python -m rose_ds.run --rose objective=r-drop alpha=0.5 strategy=none script.py ...

A script that never trained through it is an error.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rose_ds.cli.ending import ending_process_group
from rose_ds.config import RoseConfig
from rose_ds.errors import RefusedConfiguration
from rose_ds.objectives import OBJECTIVES, Objective, resolve
from rose_ds.training.trainer import RoseTrainer


class _Usage(ValueError):
    """What is wrong with the command line."""


class Command(NamedTuple):
    """A command line, taken apart."""

    rose: RoseConfig | None
    """None: --rose was not given."""
    objective: Objective | None
    """None: it was not named."""
    script: Path
    arguments: list[str]
    """The script's."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script named in ``argv``; exits with 2 and one line where the command or a setting is wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if arguments else 2)
    try:
        command = parse(arguments)
    except (ValueError, TypeError) as error:
        print(f"rose_ds.run: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        trained = run(command)
    except RefusedConfiguration as error:  # names the setting and the way out; where the script met it does not matter
        print(f"rose_ds.run: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if not trained and not {"-h", "--help"} & set(command.arguments):
        print(
            f"rose_ds.run: error: {command.script} ended without a training step of transformers.Trainer, so ROSE did "
            "nothing: was there nothing to train (evaluation alone, no steps left), or does it train in a loop of its "
            "own, which needs rose_ds.prepare()?",
            file=sys.stderr,
        )
        raise SystemExit(1)


def parse(arguments: Sequence[str]) -> Command:
    """The settings given with --rose, the script, and its arguments.

    Raises:
        ValueError/TypeError: what is wrong, in one line.
    """
    values: dict[str, Any] = {}
    launcher: list[str] = []  # the deepspeed launcher puts --local_rank before everything else
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        flag = rest.pop(0)
        if flag.startswith("--local_rank") or flag.startswith("--local-rank"):
            launcher.append(flag)
        elif flag == "--rose":
            given = len(values)
            while rest and "=" in rest[0] and not rest[0].endswith(".py"):
                key, _, value = rest.pop(0).partition("=")
                if key in values:
                    raise _Usage(f"--rose {key} is given twice")
                values[key] = _literal(value)
            if len(values) == given:
                raise _Usage("--rose needs settings: --rose key=value [key=value ...]")
        else:
            raise _Usage(f"unknown option {flag} before the script; the script's own come after it")
    if not rest:
        raise _Usage("no script given; usage: python -m rose_ds.run [--rose key=value ...] script.py [arguments]")
    script = Path(rest[0])
    if not os.path.isfile(script):  # noqa: PTH113  Path.is_file() raises where the name is too long
        raise _Usage(f"script {script} does not exist, or is not a file")
    rose, objective = _settings(values) if values else (None, None)
    return Command(rose, objective, script, [*launcher, *rest[1:]])


def _settings(values: dict[str, Any]) -> tuple[RoseConfig, Objective | None]:
    """RoseConfig's fields, ``objective``, and its constants, told apart."""
    rose = {name: value for name, value in values.items() if name in RoseConfig.field_names()}
    others = {name: value for name, value in values.items() if name not in rose}
    named = others.pop("objective", None)
    given = dict(named) if isinstance(named, Mapping) else {"name": "task" if named is None else named}
    objective = resolve(given)
    known = [f.name for f in fields(objective)]
    for name in others:
        if name in known:
            continue
        owners = [owner for owner, cls in OBJECTIVES.items() if name in {f.name for f in fields(cls)}]
        if owners:
            raise _Usage(
                f"--rose {name} is a constant of objective {' and '.join(owners)}, not of {objective.name}: add "
                f"objective={owners[0]}, or leave it out"
            )
        raise _Usage(
            f"unknown setting {name!r} after --rose; known: {list(RoseConfig.field_names())}, objective, and the "
            f"constants of objective {objective.name}: {known}"
        )
    return RoseConfig.from_mapping(rose), None if named is None else resolve({**given, **others})


def run(command: Command) -> bool:
    """Run the script as ``__main__`` with transformers.Trainer replaced; whether it trained through ROSE."""
    rose, objective, script, arguments = command
    trained = False

    class Trainer(RoseTrainer):
        """transformers.Trainer with ROSE, under the name that scripts import."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{"rose": rose, "objective": objective, **kwargs})
            if rose is not None and self._deepspeed_optimizer_block() is not None:
                raise RefusedConfiguration(
                    "settings come from --rose or from the DeepSpeed config's optimizer block, and both are given: "
                    "remove --rose, or the block"
                )

        __init__.__signature__ = inspect.signature(RoseTrainer.__init__)  # type: ignore[attr-defined]

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal trained
            loss = super().training_step(*args, **kwargs)
            trained = True  # and not where it was refused, whatever the script makes of that
            return loss

    _start_deepspeed(arguments)
    # transformers makes itself anew while some of its parts are imported (processing_utils): the one that stays
    importlib.import_module("transformers.processing_utils")
    transformers: Any = importlib.import_module("transformers")
    before = transformers.Trainer, transformers.trainer.Trainer, list(sys.argv), list(sys.path)
    processes: Any = importlib.import_module("torch.multiprocessing")
    started_in: Any = sys.modules["torch.multiprocessing.spawn"]  # the package's attribute of that name is the function
    starting = processes.start_processes, processes.spawn
    transformers.Trainer = transformers.trainer.Trainer = Trainer
    for module in (processes, started_in):
        module.start_processes = module.spawn = _refuse_processes
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))  # as python does for a script
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:  # sys.exit(0) ends many scripts, and is no proof of training
        if end.code not in (None, 0):
            raise
    finally:
        transformers.Trainer, transformers.trainer.Trainer, sys.argv, sys.path = before
        for module in (processes, started_in):
            module.start_processes, module.spawn = starting
    return trained


def _refuse_processes(*_: Any, **__: Any) -> None:
    raise RefusedConfiguration(
        "the script starts processes itself (notebook_launcher, torch.multiprocessing.spawn), and what these train "
        "would be without ROSE: have it train in this process, started by torchrun, deepspeed or accelerate launch; "
        "what they prepare, prepare before"
    )


def _start_deepspeed(arguments: Sequence[str]) -> None:
    """On CPUs transformers starts torch.distributed alone, and ZeRO-3 would load the model for a world of one."""
    launched = "RANK" in os.environ and any(a.partition("=")[0] == "--deepspeed" for a in arguments)
    if launched and not torch.accelerator.is_available():
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")


def _literal(text: str) -> Any:
    """A number or a list where the text is one, else the text itself."""
    for read in (json.loads, float):  # float knows ".5"
        try:
            return read(text)
        except (ValueError, RecursionError):
            continue
    return text


if __name__ == "__main__":
    with ending_process_group():
        main()
