"""What the analyses of trained models share: their arguments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rose_ds.cli.arguments import OF_TRAINING, Parser
from rose_ds.experiments.settings import RunSettings


@dataclass
class Rows:
    """On which rows, and where the results go."""

    _argument_group_name: ClassVar[str] = "rows and output"

    rows: int = field(default=512, metadata={"help": "Look at so many rows of a set, evenly spaced."})
    batch_size: int = field(default=64, metadata={"help": "Rows at a time."})
    output_dir: str | None = field(default=None, metadata={"help": "Default: the folder analysis in the first model."})

    def __post_init__(self) -> None:
        for name in ("rows", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def add_models(parser: Parser, text: str) -> None:
    """Positional arguments: one model or more, in ``models``."""
    parser.usage = "%(prog)s MODEL [MODEL ...] [--flag value ...]"
    parser.add_argument("models", nargs="+", metavar="MODEL", help=text)


def parse(
    command: str, description: str, arguments: Sequence[str], *settings: Any, models: str, engines: Sequence[str] = ()
) -> tuple[list[str], dict[str, Any], tuple[Any, ...]]:
    """The models, the flags of RunSettings that were given, and an instance of ``Rows`` and of each of ``settings``.

    Args:
        models: help for the positional arguments.
        engines: that can shard the models for this command.

    Raises:
        ValueError: --engine is another one.
    """
    parser = Parser(command, description, RunSettings, Rows, *settings)
    add_models(parser, models)
    parser.explain_trained()
    parser.refuse(["model"], "models are named without a flag, before the flags")
    parser.refuse(OF_TRAINING, "a finished model is looked at; leave it out")
    sharded = f"Shard each model over the launcher's ranks: {', '.join(engines)}. Default: each holds it."
    parser.explain("engine", sharded if engines else argparse.SUPPRESS)
    given = parser.given(arguments)  # which says what is wrong; transformers raises
    if given.get("engine", "auto") not in ("auto", "plain", *engines):
        instead = f"give {' or '.join(engines)} to shard them, or leave it out" if engines else "leave --engine out"
        raise ValueError(f"engine={given['engine']!r} is not for {command}, whose ranks hold whole models: {instead}")
    _, *instances, rest = parser.parse_args_into_dataclasses(list(arguments), look_for_args_file=False)
    return rest.models, given, tuple(instances)
