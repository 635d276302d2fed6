"""What the commands share: a parser whose help can be read, and the flags of a DeepSpeed config."""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from transformers import HfArgumentParser, TrainingArguments

from rose_ds.deepspeed_config import read
from rose_ds.experiments.resumable import rank_and_world

_ACCELERATOR = torch.accelerator.is_available()
#: Flags of ``RunSettings`` for what a training run writes along its way.
OF_TRAINING = ("record_masks", "disagreement_steps")


@dataclass
class RunArguments(TrainingArguments):
    """transformers' TrainingArguments, with defaults for a terminal."""

    _argument_group_name: ClassVar[str] = "training (transformers' TrainingArguments)"

    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    log_level_replica: str = field(default="error", metadata={"help": "Of transformers, on ranks but the first."})
    report_to: str = field(default="tensorboard", metadata={"help": "tensorboard, none, or another of transformers'."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Rows at a time in evaluation."})
    dataloader_pin_memory: bool = field(default=_ACCELERATOR, metadata={"help": "Pinned host memory for batches."})
    use_cpu: bool = field(
        default=not _ACCELERATOR,
        metadata={"help": "Train on the CPU; the default where there is no accelerator."},
    )

    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of an optimizer step over all ranks: --gradient_accumulation_steps follows from it, whatever "
            "the number of ranks. With it a run can go on with fewer or more of them (--resume auto)."
        },
    )

    def __post_init__(self) -> None:
        if self.global_batch_size is not None:
            self._accumulate_to(self.global_batch_size)
        # transformers (training_args.py, _setup_devices) passes --ddp_timeout on for accelerators alone: CPU ranks
        # would wait half an hour for a host that is gone
        several = "RANK" in os.environ and rank_and_world()[1] > 1
        if self.use_cpu and several and self.ddp_backend in (None, "gloo") and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(seconds=self.ddp_timeout))
        super().__post_init__()

    @property
    def n_gpu(self) -> int:
        """One: without a launcher a command is one process on the first GPU, and not transformers' DataParallel."""
        return min(1, int(super().n_gpu))

    def _accumulate_to(self, rows: int) -> None:
        if self.gradient_accumulation_steps != 1:  # type: ignore[has-type]  # transformers' field
            raise ValueError("--global_batch_size sets --gradient_accumulation_steps: give one of the two")
        ranks = rank_and_world()[1]
        at_once = ranks * self.per_device_train_batch_size
        if rows < 1 or rows % at_once:
            raise ValueError(
                f"--global_batch_size {rows} is no multiple of {at_once}, the rows that {ranks} rank(s) take at once "
                f"(--per_device_train_batch_size {self.per_device_train_batch_size})"
            )
        self.gradient_accumulation_steps = rows // at_once


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, each flag in one spelling, and defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if isinstance(action, argparse._StoreFalseAction):  # transformers gives it the text of its opposite
            return f"The opposite of --{action.dest}."
        told = "default" in text.lower() or action.default in (None, argparse.SUPPRESS, "", [])
        return text if told or not action.option_strings else f"{text} (default: %(default)s)"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if len(action.option_strings) > 1 and all(s.startswith("--") for s in action.option_strings):
            action = copy.copy(action)  # transformers adds --max-steps to --max_steps
            action.option_strings = [min(action.option_strings, key=len)]
        return super()._format_action_invocation(action)


class Parser(HfArgumentParser):
    """A command's flags, made of the fields of dataclasses; a wrong one ends the process with exit code 2."""

    def __init__(self, command: str, description: str, *settings: Any) -> None:
        super().__init__(
            settings,
            prog=f"rose-ds {command}",
            usage="%(prog)s [--flag value ...]",
            description=description,
            allow_abbrev=False,
            formatter_class=HelpFormatter,
        )
        self._refused: dict[str, str] = {}

    def refuse(self, names: Sequence[str], why: str) -> None:
        """Flags of shared settings that mean nothing to this command: not in its help, and an error where given."""
        for name in names:
            self.explain(name, argparse.SUPPRESS)
        self._refused |= dict.fromkeys(names, why)

    def explain(self, name: str, text: str) -> None:
        """Another help text for a flag that means something else in this command; argparse.SUPPRESS: none."""
        for action in self._actions:
            if action.dest == name:
                action.help = text

    def require_model(self) -> None:
        """A trained one: there is no default."""
        for action in self._actions:
            if action.dest == "model":
                action.help, action.required, action.default = "The trained model's folder, or a hub id.", True, None

    def explain_trained(self) -> None:
        """Help for commands that look at a trained model, whose run says what it was trained on."""
        self.explain("task", "sst2, rte, qnli, qqp or snippets; with files of your own, a name. Default: the run's.")
        self.explain("max_length", "Longer inputs are cut to this many tokens. Default: the run's.")

    def given(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The flags on a command line, by name, without the defaults of the others.

        Raises:
            ValueError: one that ``refuse`` was told of.
        """
        unset = object()
        names = [f.name for settings in self.dataclass_types for f in fields(settings) if f.init]
        namespace = vars(self.parse_args(arguments, argparse.Namespace(**dict.fromkeys(names, unset))))
        found = {name: value for name, value in namespace.items() if value is not unset}
        wrong: dict[str, list[str]] = {}
        for name in found:
            if name in self._refused:
                wrong.setdefault(self._refused[name], []).append(f"--{name}")
        if wrong:
            raise ValueError("; ".join(f"{', '.join(flags)}: {why}" for why, flags in wrong.items()))
        return found

    def settings(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """An instance of each dataclass."""
        self.given(arguments)  # which says what is wrong with a flag; transformers raises for an unknown one
        return self.parse_args_into_dataclasses(list(arguments), look_for_args_file=False)


def precision_flags(arguments: Sequence[str]) -> list[str]:
    """--bf16 or --fp16 where the DeepSpeed config enables it: transformers demands that both say so."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--deepspeed")
    path = parser.parse_known_args(arguments)[0].deepspeed
    if not path:
        return []
    config = read(path, "--deepspeed")
    given = {a.split("=")[0] for a in arguments}
    enabled = [section for section in ("bf16", "fp16") if config.get(section, {}).get("enabled") is True]
    return [f"--{section}" for section in enabled if f"--{section}" not in given]
