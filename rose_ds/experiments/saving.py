"""What a run leaves behind, written whole beside the old before it takes its place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi

from rose_ds.errors import RefusedConfiguration
from rose_ds.exchange import RankLost, explaining_lost_ranks
from rose_ds.training import checkpoints

if TYPE_CHECKING:
    from transformers import TrainingArguments

#: With an underscore: Trainer uploads no such folder.
PARTIAL = "_unfinished"


def refuse_unsavable(args: TrainingArguments) -> None:
    """Before training.

    Raises:
        RefusedConfiguration: ranks hold parts of the model, and nothing would put them together.
    """
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    key = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if deepspeed is not None and deepspeed.is_zero3() and not deepspeed.is_true(key):
        raise RefusedConfiguration(f"at ZeRO-3 the trained model cannot be saved whole without {key}: set it to true")


def save_result(trainer: Any, output_dir: Path, others: Callable[[Path], None]) -> None:
    """Write the trained model and what else a run leaves into ``output_dir``. Every rank calls it.

    All files are first written to a folder inside and then moved, which takes no room on the disk: where one cannot be
    written, those of before stay as they were.

    Args:
        others: writes further files into the folder it is given; called on rank 0, after the model was written.

    Raises:
        CheckpointError: something could not be written.
    """
    partial, first = output_dir / PARTIAL, trainer.is_world_process_zero()
    try:
        if first and partial.exists():
            shutil.rmtree(partial)  # of a run that was killed
        checkpoints.gather(None)
        with explaining_lost_ranks(lambda: f"saving the trained model in {output_dir}"):
            trainer.save_model(str(partial), _internal_call=True)  # or it would push what is not whole yet
        if first:
            others(partial)
            checkpoints.to_disk(path for path in partial.rglob("*") if path.is_file())
            _move(partial, output_dir)
        checkpoints.gather(None)  # no rank ends before the result is there
    except RankLost:
        raise
    except Exception as error:
        if first:
            shutil.rmtree(partial, ignore_errors=True)  # it would take the room that the next attempt needs
        raise checkpoints.not_written(f"the trained model in {output_dir}", output_dir, error) from error
    if first and trainer.args.push_to_hub:
        _push(trainer, output_dir)


def _push(trainer: Any, folder: Path) -> None:
    """The folder as it is, with its model card and what was measured, which Trainer's own push would write over."""
    repository = trainer.hub_model_id
    try:
        HfApi(token=trainer.args.hub_token).upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Trained with rose_ds",
            ignore_patterns=["_*", "checkpoint-*", "training_args.bin"],  # which has the token
            revision=trainer.args.hub_revision,
        )
    except Exception as error:
        raise ValueError(
            f"the trained model is in {folder}, but could not be pushed to {repository} ({error}): hf upload "
            f"{repository} {folder}"
        ) from error


def _move(source: Path, target: Path) -> None:
    """Every file of a folder into another one, over those of the same names, metrics.json last: a folder with it has
    been written to its end."""
    files = [path for path in source.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.name == "metrics.json", path)):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    shutil.rmtree(source)
