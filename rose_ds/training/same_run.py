"""Whether a resumed run is the run that it goes on with: what of its settings must be the same."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import has_length

from rose_ds.config import RoseConfig
from rose_ds.errors import RefusedConfiguration
from rose_ds.training import checkpoints
from rose_ds.training.loaders import SteadyLoaders

logger = logging.getLogger(__name__)

#: TrainingArguments that a resumed run must share. Trainer takes the optimizer's from the checkpoint, so that another
#: value would silently change nothing.
_FIXED = (
    "seed",
    "data_seed",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "neftune_noise_alpha",
)
_OF_AN_EPOCH = "rows of an epoch (dataloader_drop_last)"
_FREE = (
    "world_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_epochs",
    "warmup_steps",
    "logging_steps",
    "save_steps",
    "ignore_data_skip",
    "lr_scheduler_kwargs",
)


def precision_of(args: TrainingArguments) -> str:
    """fp32, bf16 or fp16, by a flag or by accelerate's config, whose launcher tells it in a variable."""
    chosen = "bf16" if args.bf16 else "fp16" if args.fp16 else getattr(args, "mixed_precision", "no")
    return "fp32" if chosen == "no" else chosen


def schedule_of(args: TrainingArguments) -> str:
    """The learning-rate schedule's name."""
    return str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))


class SameRunTrainer(SteadyLoaders):
    """What RoseTrainer compares before it goes on from a checkpoint."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fixed_settings: dict[str, Any] = {}
        """Further settings, by name, that a checkpoint records and a resumed run must share."""
        self._resumed: checkpoints.Record | None = None
        """Of the checkpoint that the run under way goes on from."""

    @property
    def engine_name(self) -> str:
        """The engine that training runs on."""
        raise NotImplementedError

    def method_settings(self) -> dict[str, Any]:
        """Settings of the training method, which a resumed run must share."""
        raise NotImplementedError

    def _check_resumable(self, folder: Path) -> checkpoints.Record:
        record = checkpoints.read(folder)
        self._refuse_dispatched()
        if self.args.auto_find_batch_size:  # Trainer goes on with the batch size that had been found
            found = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).train_batch_size
            self._train_batch_size: int = found or self.args.train_batch_size
        fixed, free = self._settings()
        # a checkpoint of before there was a record of one says nothing about it
        recent = (*_FIXED, _OF_AN_EPOCH)
        fixed = {name: value for name, value in fixed.items() if name in record.fixed or name not in recent}
        # nor does one of before a setting of the masks was there, whose default does what was done then
        for name in fixed.keys() - record.fixed.keys():
            if name in RoseConfig.field_names() and fixed[name] == getattr(RoseConfig, name):
                del fixed[name]
        for change in checkpoints.check_settings(folder, record, self.engine_name, fixed, free):
            logger.info("resuming with another setting: %s", change)
        return record

    def _settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings that a resumed run must share, because it computes something else or silently keeps the old value
        otherwise; and those it may change."""
        args = self.args
        fixed = {
            **self.fixed_settings,
            **self.method_settings(),
            "rows": len(self.train_dataset) if has_length(self.train_dataset) else None,
            "global batch": self.get_total_train_batch_size(args),
            "precision": precision_of(args),
            **{name: getattr(args, name) for name in _FIXED},
        }
        if args.dataloader_drop_last and fixed["rows"] is not None:
            at_once = self.get_total_train_batch_size(args) // args.gradient_accumulation_steps
            fixed[_OF_AN_EPOCH] = fixed["rows"] // at_once * at_once
        free = {name: getattr(args, name) for name in _FREE}
        free["lr_scheduler_type"] = schedule_of(args)
        return fixed, free

    def _refuse_dispatched(self) -> None:
        """accelerate reads a batch for each rank to make one that is dispatched, and skips as if it read one."""
        how, args = self.args.accelerator_config, self.args
        by_batch = has_length(self.train_dataset) and not isinstance(self.train_dataset, IterableDataset)
        skips = by_batch and not args.ignore_data_skip
        if how.dispatch_batches and not how.split_batches and args.world_size > 1 and skips:
            raise RefusedConfiguration(
                "accelerator_config dispatch_batches=True on several ranks would go on with other rows than the "
                "checkpoint's run: leave it out, which gives each rank the rows that were dispatched to it"
            )

    def _refuse_rounds(self) -> None:
        """Trainer skips as many batches of one round as were trained on in all."""
        rounds = self.state.epoch or 0.0
        skips = not (has_length(self.train_dataset) or self.args.ignore_data_skip)
        if self._resumed is not None and rounds > 1 and skips:
            raise RefusedConfiguration(
                f"the training stream had begun its round {int(rounds) + 1} when the checkpoint was saved, and from "
                "which of its rows to go on nobody knows. Give it a length, or let it repeat itself; with "
                "ignore_data_skip=True it begins anew"
            )
