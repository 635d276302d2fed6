"""``rose-ds train``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from rose_ds.cli import first_rank
from rose_ds.cli.arguments import Parser, RunArguments, precision_flags
from rose_ds.experiments.methods import METHODS
from rose_ds.experiments.resumable import rank_and_world
from rose_ds.experiments.settings import MethodSettings, RunSettings, from_preset


@dataclass
class Rehearsal:
    """Whether to train at all."""

    _argument_group_name: ClassVar[str] = "rehearsal"

    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Load everything, take one step, and print engine, what is masked, dropout, effective batch, how "
            "many steps and peak memory, or what is refused. Writes nothing."
        },
    )


_DESCRIPTION = """Fine-tune a classifier and measure it on clean, adversarial and perturbed text.

Examples:
  rose-ds train --task snippets --method rose-ensemble --max_steps 200 --output_dir runs/ensemble
  rose-ds train --task sst2 --data glue/ --model roberta-base --method rose-first --output_dir runs/sst2
  rose-ds train --task qnli --method r-drop+rose-first --rdrop_alpha 0.5 --keep_first 0.7 --output_dir runs/both
  rose-ds train --task rte --method rose-ensemble --preset paper-base --output_dir runs/rte    # published settings
  rose-ds train --task rte --method rose-ensemble --output_dir runs/rte --dry_run    # one step, and what would happen
  deepspeed --num_gpus 8 launch/train.py --deepspeed ds_configs/zero2_bf16.json --task qnli --model roberta-large \\
      --method rose-ensemble --learning_rate 1e-5 --adam_beta2 0.98 --weight_decay 0.01 --output_dir runs/qnli

Writes the model (model.safetensors, config, tokenizer), metrics.json, checkpoints and TensorBoard logs to --output_dir.

Methods:
{methods}
  OBJECTIVE+MASK  one of r-drop, smart, freelb with one of those that choose parameters, e.g. freelb+rose-ensemble"""


def run(arguments: Sequence[str]) -> None:
    """Train, and print what was measured."""
    methods = "\n".join(f"  {method.name:<14}  {method.text}" for method in METHODS.values())
    parser = Parser("train", _DESCRIPTION.format(methods=methods), RunSettings, MethodSettings, RunArguments, Rehearsal)
    for name in ("enable_jit_checkpoint", "optim_args", "optim_target_modules"):
        parser.explain(name, argparse.SUPPRESS)  # refused, with reasons of their own
    parser.explain("optim", "Whose kernels update what is not masked: adamw_torch or adamw_torch_fused.")
    arguments = [*arguments, *precision_flags(arguments)]
    preset = from_preset(parser.given(arguments), rank_and_world()[1])
    if preset is not None:
        parser.set_defaults(**preset.settings)
    settings, method, args, rehearsal = parser.settings(arguments)
    method.filled_in = preset
    from rose_ds.experiments.train import rehearse, train

    if rehearsal.dry_run:
        told = rehearse(settings, method, args)
        if first_rank():
            print(told)
        return
    metrics = train(settings, method, args)
    if first_rank():
        print(metrics.summary())
        print(f"model and metrics.json in {args.output_dir}")
