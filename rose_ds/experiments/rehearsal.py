"""``rose-ds train --dry_run``: the first optimizer step of a run and what is known by then; nothing is written."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rose_ds.hardware import peak_memory_bytes
from rose_ds.training import checkpoints
from rose_ds.training.same_run import precision_of, schedule_of

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from rose_ds.training.trainer import RoseTrainer


def shorten(args: TrainingArguments) -> dict[str, Any]:
    """Make ``args`` those of a run of one step that saves, evaluates and logs nothing; what they said before.

    In place, since a Trainer's DeepSpeed settings hang on the object; before a Trainer is made of it.
    """
    shorter: dict[str, Any] = {
        "max_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "load_best_model_at_end": False,
        "disable_tqdm": True,
        "resume_from_checkpoint": None,
    }
    planned = {name: getattr(args, name) for name in shorter}
    for name, value in shorter.items():
        # strategies are enums, each its own
        setattr(args, name, type(planned[name])(value) if name.endswith("_strategy") else value)
    return planned


def first_step(trainer: RoseTrainer, planned: dict[str, Any]) -> str:
    """Take the first step, and say what the run is going to be. Every rank calls it.

    Raises:
        RefusedConfiguration: as the run itself would.
    """
    args, meter = trainer.args, trainer.measure()
    loss = trainer.train().training_loss
    assert trainer.stepper is not None
    rows, batch, ranks = len(trainer.train_dataset), args.per_device_train_batch_size, args.world_size  # type: ignore[arg-type]
    accumulation = args.gradient_accumulation_steps
    epoch = max(math.ceil(math.ceil(rows / (batch * ranks)) / accumulation), 1)
    steps = planned["max_steps"] if planned["max_steps"] > 0 else math.ceil(epoch * args.num_train_epochs)
    peaks = [peak for peak in checkpoints.gather(peak_memory_bytes(args.device)) if peak is not None]
    memory = f", peak memory of a rank {max(peaks) / 2**20:,.0f} MiB" if peaks else ""
    return "\n".join(
        [
            trainer.stepper.describe(),
            f"  effective batch: {batch} rows x {ranks} rank{'s' * (ranks > 1)} x {accumulation} micro-batch"
            f"{'es' * (accumulation > 1)} = {batch * ranks * accumulation} rows an optimizer step",
            f"  {rows:,} rows, {epoch:,} steps an epoch, {steps:,} steps in all ({steps / epoch:.1f} epochs)",
            f"  {precision_of(args)}, learning rate {args.learning_rate:g}, {schedule_of(args)}",
            f"  the first step: loss {loss:.4f}, {meter.step_seconds[0]:.2f} s{memory}",
            "Nothing was refused and nothing was written: leave --dry_run out to train.",
        ]
    )
