"""The ``rose-ds`` command: parses, calls, prints."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

from rose_ds import __version__
from rose_ds.ending import ending_process_group
from rose_ds.engines.base import RefusedConfiguration
from rose_ds.experiments.settings import MethodSettings, RunSettings

_TRAIN = """Fine-tune a classifier and measure it on clean, adversarial and perturbed text.

Examples:
  rose-ds train --task snippets --method rose-ensemble --max_steps 200 --output_dir runs/ensemble
  rose-ds train --task sst2 --data glue/ --model roberta-base --method rose-first --output_dir runs/sst2
  deepspeed --num_gpus 8 launch/train.py --deepspeed ds_configs/zero2_bf16.json --task qnli --model roberta-large \\
      --method rose-ensemble --learning_rate 1e-5 --adam_beta2 0.98 --weight_decay 0.01 --output_dir runs/qnli

Writes the model (model.safetensors, config, tokenizer), metrics.json, checkpoints and TensorBoard logs to --output_dir.
The flags after --resume are transformers' TrainingArguments."""

_EVALUATE = """Accuracy of a trained classifier on a task's clean, adversarial and perturbed dev sets.

Example:
  rose-ds evaluate --task sst2 --data glue/ --model runs/sst2 --output_dir runs/sst2-evaluated"""

_REPORT = """Runs side by side: prints a table, writes comparison.json and comparison.png.

Example:
  rose-ds report runs/vanilla runs/ensemble --output_dir runs/compared"""

_COMMANDS = {
    "train": "fine-tune a classifier with ROSE or a baseline, and measure its robustness",
    "evaluate": "measure a trained classifier on clean, adversarial and perturbed text",
    "report": "compare finished runs: table, JSON and chart",
}


_ACCELERATOR = torch.accelerator.is_available()


@dataclass
class RunArguments(TrainingArguments):
    """transformers' TrainingArguments, with defaults for a terminal."""

    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    report_to: str = field(default="tensorboard", metadata={"help": "tensorboard, none, or another of transformers'."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Rows at a time in evaluation."})
    dataloader_pin_memory: bool = field(default=_ACCELERATOR, metadata={"help": "Pinned host memory for batches."})
    use_cpu: bool = field(
        default=not _ACCELERATOR,
        metadata={"help": "Train on the CPU; the default where there is no accelerator."},
    )


def program(argv: Sequence[str] | None = None) -> None:
    """``main`` as a process of its own, which ends with it."""
    with ending_process_group():
        main(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``rose-ds``; exits with 2 and one line on bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO if _first_rank() else logging.ERROR, format="%(levelname)s %(message)s")
    if not arguments or arguments[0] not in _COMMANDS:
        _overview(arguments)
        return
    command, rest = arguments[0], arguments[1:]
    try:
        {"train": _train, "evaluate": _evaluate, "report": _report}[command](rest)
    except (ValueError, TypeError, FileNotFoundError) as error:
        # Ours name the setting and the way out; a traceback adds nothing. Others are bugs and keep theirs.
        if not _is_users_error(error):
            raise
        if _first_rank():
            print(f"rose-ds {command}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _overview(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="rose-ds", description="Adversarially robust fine-tuning (ROSE) for sharded training."
    )
    parser.add_argument("--version", action="version", version=f"rose_ds {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in _COMMANDS.items():
        commands.add_parser(name, help=text, description="see rose-ds " + name + " --help")
    parser.epilog = "Each command has its own --help."
    parser.parse_args(arguments)


def _train(arguments: list[str]) -> None:
    parser = _parser("train", _TRAIN, RunSettings, MethodSettings, RunArguments)
    run, method, args = parser.parse_args_into_dataclasses([*arguments, *_precision_flags(arguments)])
    from rose_ds.experiments.run import train

    metrics = train(run, method, args)
    if _first_rank():
        print(metrics.summary())
        print(f"model and metrics.json in {args.output_dir}")


def _evaluate(arguments: list[str]) -> None:
    parser = _parser("evaluate", _EVALUATE, RunSettings, RunArguments)
    run, args = parser.parse_args_into_dataclasses(arguments)
    from rose_ds.experiments.run import evaluate

    metrics = evaluate(run, args)
    if _first_rank():
        print(metrics.summary())


def _report(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="rose-ds report", description=_REPORT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders with a metrics.json")
    parser.add_argument("--output_dir", type=Path, required=True, help="where comparison.json and comparison.png go")
    options = parser.parse_args(arguments)
    from rose_ds.experiments.compare import table, write
    from rose_ds.experiments.metrics import Metrics

    runs = [Metrics.read(folder) for folder in options.runs]
    record, chart = write(runs, options.output_dir)
    print(table(runs))
    print(f"written: {record}" + (f", {chart}" if chart else " (no chart: pip install matplotlib)"))


def _parser(command: str, description: str, *settings: Any) -> HfArgumentParser:
    return HfArgumentParser(settings, prog=f"rose-ds {command}", description=description, allow_abbrev=False)


def _precision_flags(arguments: list[str]) -> list[str]:
    """--bf16 or --fp16 where the DeepSpeed config enables it: transformers demands that both say so."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--deepspeed")
    path = parser.parse_known_args(arguments)[0].deepspeed
    if not path:
        return []
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RefusedConfiguration(f"--deepspeed {path}: {str(error.strerror).lower()}") from error
    except (ValueError, RecursionError) as error:  # also: not UTF-8, a NUL in the path
        raise RefusedConfiguration(f"--deepspeed {path} is not JSON: {error}") from error
    wrong = _misshapen(config)
    if wrong:
        raise RefusedConfiguration(f"--deepspeed {path}: {wrong}")
    given = {a.split("=")[0] for a in arguments}
    enabled = [section for section in ("bf16", "fp16") if config.get(section, {}).get("enabled") is True]
    return [f"--{section}" for section in enabled if f"--{section}" not in given]


def _misshapen(config: Any) -> str | None:
    """What is wrong with the parts of a DeepSpeed config that transformers takes for granted."""
    if not isinstance(config, dict):
        return f"a DeepSpeed config is a JSON object, found {config!r:.80}"
    for name in ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler"):
        section = config.get(name, {})
        if not isinstance(section, dict):
            return f'"{name}" must be an object, found {section!r:.80}'
        for key, wanted, fits in (
            ("stage", "0, 1, 2 or 3", lambda v: type(v) is int and 0 <= v <= 3),
            ("enabled", 'true, false or "auto"', lambda v: isinstance(v, bool) or v == "auto"),
            ("type", "a name", lambda v: isinstance(v, str)),
            ("params", "an object", lambda v: isinstance(v, dict)),
        ):
            if key in section and not fits(section[key]):
                return f'"{key}" in "{name}" must be {wanted}, found {section[key]!r:.80}'
    if all(config.get(section, {}).get("enabled") is True for section in ("bf16", "fp16")):
        return '"bf16" and "fp16" are both enabled: enable one'
    return None


def _is_users_error(error: Exception) -> bool:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = "" if frame is None else str(frame.tb_frame.f_globals.get("__name__", ""))
    return module.startswith("rose_ds")


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"
