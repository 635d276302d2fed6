"""The ``rose-ds`` command: parses, calls, prints. One file a command."""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rose_ds import __version__
from rose_ds.cli.ending import ending_process_group

#: Seconds until a rank that is not the first says what went wrong on it.
_PATIENCE = 5.0
#: Name -> what it does. The module that does it has the name's last word.
COMMANDS = {
    "doctor": "check an environment before a long run, and say what to mend",
    "train": "fine-tune a classifier with ROSE or a baseline, and measure its robustness",
    "evaluate": "measure a trained classifier on clean, adversarial and perturbed text",
    "attack": "search for misspellings that change a classifier's answers: accuracy under attack",
    "sweep": "run methods x tasks x seeds x settings, resumable and shared between machines",
    "bench": "what each method's training step costs on this machine, beside AdamW's",
    "inspect": "what the masks of runs kept, layer by layer, on one page",
    "landscape": "the loss around trained models, in pictures and numbers (Eq. 6)",
    "interpolate": "loss and accuracy on the line between two models (Eq. 7)",
    "probe": "whether a model prefers syntax or the surface (Section 4.2)",
    "dropout-disagreement": "how often two dropout passes give two answers (Table 4)",
    "report": "compare finished runs: table, JSON and chart",
}


def program(argv: Sequence[str] | None = None) -> None:
    """``main`` as a process of its own, which ends with it."""
    with ending_process_group():
        main(argv, alone=True)


def main(argv: Sequence[str] | None = None, alone: bool = False) -> None:
    """Run ``rose-ds``; exits with 2 and one line on bad input.

    Args:
        argv: the command and its flags.
        alone: the process does nothing else, so no garbage collection has to look through what is imported.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].startswith("--local_rank="):
        del arguments[0]  # deepspeed --module puts it before all else; the environment says it too
    if not arguments or arguments[0] not in COMMANDS:
        _overview(arguments)
        return
    command, rest = arguments[0], arguments[1:]
    with _no_garbage_in_imports(alone):
        run = _function_of(command)
    transformers = sys.modules.get("transformers")
    if transformers is not None and not first_rank():  # whose bars and advice would stand between the first one's
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
    logging.basicConfig(level=logging.INFO if first_rank() else logging.ERROR, format="%(levelname)s %(message)s")
    try:
        run(rest)
    except (ValueError, TypeError, FileNotFoundError) as error:
        # Ours name the setting and the way out; a traceback adds nothing. Others are bugs and keep theirs.
        if not _is_users_error(error):
            raise
        where = ""
        if not first_rank():
            time.sleep(_PATIENCE)  # where all ranks have failed alike, the launcher ends this one first
            where = f" (rank {os.environ['RANK']} on {socket.gethostname()})"
        print(f"rose-ds {command}: error{where}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def first_rank() -> bool:
    """Whether this process is the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def _function_of(command: str) -> Callable[[Sequence[str]], None]:
    """Imported when it is wanted: transformers takes seconds."""
    function: Callable[[Sequence[str]], None] = importlib.import_module(f"rose_ds.cli.{command.rpartition('-')[2]}").run
    return function


@contextmanager
def _no_garbage_in_imports(alone: bool) -> Iterator[None]:
    """Without collections, which take a fifth of an import's time and later half a second each."""
    if not alone:
        yield
        return
    gc.disable()
    yield
    gc.freeze()
    atexit.register(gc.unfreeze)  # or the interpreter cannot take modules apart, and nanobind's report leaks
    gc.enable()


def _overview(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="rose-ds", description="Adversarially robust fine-tuning (ROSE) for sharded training."
    )
    parser.add_argument("--version", action="version", version=f"rose_ds {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, description="see rose-ds " + name + " --help")
    parser.epilog = (
        "Each command has its own --help. A Trainer script as it is: python -m rose_ds.run --help. "
        "Guides: docs/ of the sources."
    )
    parser.parse_args(arguments)


def _is_users_error(error: Exception) -> bool:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = "" if frame is None else str(frame.tb_frame.f_globals.get("__name__", ""))
    return module.startswith("rose_ds")
