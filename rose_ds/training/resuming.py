"""A transformers.Trainer that loses nothing: whole checkpoints, and resumed runs that are the run they were."""

from __future__ import annotations

import inspect
import itertools
import json
import logging
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from transformers import Trainer, set_seed
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import rotate_checkpoints

from rose_ds.engines.rng import AllRandom
from rose_ds.errors import RefusedConfiguration
from rose_ds.exchange import RankLost, explaining_lost_ranks
from rose_ds.hardware import peak_memory_bytes
from rose_ds.training import checkpoints
from rose_ds.training.callbacks import StepMeter, StopOnSigterm
from rose_ds.training.loaders import set_epoch, with_settings
from rose_ds.training.missed_evaluation import MissedEvaluation
from rose_ds.training.same_run import SameRunTrainer
from rose_ds.training.sole_use import sole_use_of
from rose_ds.training.step_report import StepReport

logger = logging.getLogger(__name__)


def with_trainers_arguments(init: Callable[..., None], *own: str) -> inspect.Signature:
    """Trainer's arguments by name, since scripts look which of them a version of transformers has, and ``own`` of those
    of a subclass's ``init``.
    """
    mine = inspect.signature(init).parameters
    return inspect.Signature([*inspect.signature(Trainer.__init__).parameters.values(), *(mine[name] for name in own)])


class ResumableTrainer(SameRunTrainer):
    """What RoseTrainer does about checkpoints; see there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        handler = signal.getsignal(signal.SIGTERM)
        super().__init__(*args, **kwargs)
        self.meter: StepMeter | None = None
        self.disagreements: list[Tensor] = []
        """Since the last log, a micro-batch each: the fraction of rows whose two dropout passes gave two answers."""
        self.resumed_folder: Path | None = None
        """The checkpoint that the run under way goes on from."""
        self.ignored_keys: list[str] | None = None
        """Of a model's outputs, in evaluations along training."""
        self.random_state: AllRandom | None = None
        """Which training goes on with, where an evaluation came first."""
        self._before: dict[Path, dict[Path, int]] = {}
        """Files of checkpoints' folders that were there when training began, and when they were written."""
        self._saved_step: int | None = None
        """Of the last checkpoint that was written."""
        self._just_saved: Path | None = None
        """A checkpoint that callbacks may be writing into."""
        self._stop = StopOnSigterm()
        self.add_callback(self._stop)
        self.add_callback(MissedEvaluation(self))
        if self.args.enable_jit_checkpoint:
            signal.signal(signal.SIGTERM, handler)  # Trainer has already put its own there
            raise RefusedConfiguration(
                "enable_jit_checkpoint=True lets each rank save by itself, in whatever step a signal finds it: leave "
                "it out. RoseTrainer saves on SIGTERM, all ranks together"
            )

    @property
    def last_report(self) -> StepReport | None:
        """The last optimizer step's report."""
        raise NotImplementedError

    def before_first_epoch(self, model: nn.Module) -> None:
        """Called once training is set up, and a checkpoint is loaded."""
        raise NotImplementedError

    def save_method_state(self, folder: Path) -> None:
        """Write what the method keeps over a run into a checkpoint's folder."""
        raise NotImplementedError

    def optimizer_steps(self) -> int:
        """Optimizer steps taken, by the state that lies on this rank."""
        raise NotImplementedError

    def measure(self) -> StepMeter:
        """Time the steps of the following ``train()``, and count what their masks keep."""
        self.meter = StepMeter(self)
        self.add_callback(self.meter)
        return self.meter

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's. True goes on from the newest whole checkpoint in ``output_dir``; there must be one."""
        folder = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, (str, Path)) else None
        if resume_from_checkpoint is True:
            folder = self.newest_checkpoint()
            if folder is None:
                raise RefusedConfiguration(f"{self.args.output_dir} holds no whole checkpoint to resume from")
        self._resumed = None if folder is None else self._check_resumable(folder)
        self._counts_restored = False
        self._saved_step = self._just_saved = self.random_state = None
        self.resumed_folder = folder
        self.ignored_keys = kwargs.get("ignore_keys_for_eval", args[1] if len(args) > 1 else None)
        missed = self.pop_callback(MissedEvaluation)
        if missed is not None:  # a script may have taken it out
            self.add_callback(missed)  # others begin before it evaluates
        # a run that saves nothing has nothing to finish
        with ExitStack() as around:
            if self.args.save_strategy != "no":
                if not args and kwargs.get("trial") is None:  # a search's trials have folders of their own
                    around.enter_context(sole_use_of(Path(self.args.output_dir)))
                self._before = checkpoints.files_below(Path(self.args.output_dir)) if self.args.should_save else {}
                around.enter_context(self._stop.listening())
            result = super().train(None if folder is None else str(folder), *args, **kwargs)
        if self._resumed is not None and not self._counts_restored:  # the checkpoint was that of the last step
            self._restore_counts(self._resumed)
        if self._stop.stopping:
            if self.is_world_process_zero():
                step = self.state.global_step
                resume = (
                    "only the model, so nothing can resume"
                    if self.args.save_only_model
                    else "resume with --resume auto"
                )
                if self._saved_step == step:
                    logger.warning("SIGTERM received: checkpoint saved at step %d, %s", step, resume)
                else:
                    logger.warning("SIGTERM received: stopped at step %d, and no checkpoint was saved", step)
            raise SystemExit(128 + signal.SIGTERM)  # the shell's code for it: a job that was stopped has not succeeded
        return result

    def peak_memory_bytes(self) -> int | None:
        """Most memory that one rank has held, also in the processes before this one; None where nobody knows. Every
        rank calls it.
        """
        earlier = 0 if self.meter is None else self.meter.earlier_peak_bytes
        return max([*checkpoints.gather(peak_memory_bytes(self.args.device) or 0), earlier]) or None

    @property
    def took_no_step(self) -> bool:
        """Whether training went on from a checkpoint of its last step."""
        return self._resumed is not None and self._resumed.step == self.state.global_step

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint in ``output_dir`` that is whole; logs which are passed over. Every rank calls it."""
        folder, torn = checkpoints.newest(Path(self.args.output_dir))
        for reason in torn:
            logger.warning("checkpoint passed over: %s", reason)
        return folder

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        epochs_trained, steps_trained = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)  # a checkpoint's logging, eval and save steps give way
        return epochs_trained, steps_trained

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer's; on another number of ranks, whose random numbers nobody has saved, a seed of this step's own."""
        if self.random_state is not None:
            self.random_state.restore()
            self.random_state = None
            return
        if self._resumed is None or self._resumed.world_size == self.args.world_size:
            super()._load_rng_state(checkpoint)
            return
        seed = int(np.random.SeedSequence((self.args.seed, self._resumed.step)).generate_state(1)[0])
        logger.info(
            "resuming on %d ranks from a checkpoint of %d: dropout goes on with seed %d, made of seed and step",
            self.args.world_size,
            self._resumed.world_size,
            seed,
        )
        set_seed(seed)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._resumed is not None and kwargs["epoch"] == kwargs["epochs_trained"]:
            self._restore_counts(self._resumed)
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True  # Trainer would take one step more
            return
        if kwargs["epoch"] == kwargs["epochs_trained"]:
            self._refuse_rounds()
            self.before_first_epoch(kwargs["model"])
            if self._resumed is not None:
                set_epoch(kwargs["train_dataloader"], kwargs["epoch"])  # of which Trainer is going to skip a part
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; a run that SIGTERM stopped is not at its end: no checkpoint goes, and no best model is loaded."""
        stopped = {"load_best_model_at_end": False, "save_total_limit": None} if self._stop.stopping else {}
        with with_settings(self.args, **stopped):
            return super()._finalize_training(*args, **kwargs)

    def _restore_counts(self, record: checkpoints.Record) -> None:
        """The loss that is logged next and the meter's totals are those of a run that was never interrupted."""
        steps = max(checkpoints.gather(self.optimizer_steps()))
        if self.is_deepspeed_enabled and steps == 0 < record.optimizer_steps:
            raise RefusedConfiguration(
                "no ROSE state was loaded from the checkpoint: a create_scheduler() of one's own must call super()'s, "
                "which is where ROSE is attached to the DeepSpeedEngine"
            )
        if steps != record.optimizer_steps:
            raise RuntimeError(
                f"the checkpoint was saved after {record.optimizer_steps} optimizer steps, but the optimizer's state "
                f"that was loaded is of {steps}: training would silently go on with other moments"
            )
        self._counts_restored = True
        if self.meter is not None:
            self.meter.restore(record.totals)
        same = len(record.unlogged_loss) == self.args.world_size
        mean = sum(record.unlogged_loss) / len(record.unlogged_loss)
        self._tr_loss += record.unlogged_loss[self.args.process_index] if same else mean
        values = record.unlogged_disagreements
        mine = values[self.args.process_index] if same and values else list(itertools.chain(*values))
        self.disagreements = list(torch.tensor(mine, device=self.args.device))
        self._globalstep_last_logged = record.logged_step

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's. After SIGTERM it saves, whatever callbacks have made of that since; and what these write into a
        checkpoint once it is there is part of it.
        """
        if self._stop.stopping and self._saved_step != self.state.global_step:
            self.control.should_save = self.control.should_training_stop = True
            self.control.should_evaluate = False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._just_saved is not None:  # on every rank
            checkpoints.gather(None)  # callbacks have written on all of them
            if self.args.should_save:
                checkpoints.follow_changes(self._just_saved)
            checkpoints.gather(None)
            self._just_saved = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's, then the record that makes it whole, and only then are old ones deleted and is it pushed."""
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        limit, push = self.args.save_total_limit, self.args.push_to_hub
        with with_settings(self.args, save_total_limit=None, push_to_hub=False):
            try:
                self._remove_stale(folder)
                checkpoints.gather(None)
                with explaining_lost_ranks(lambda: f"saving {folder}"):
                    super()._save_checkpoint(model, trial)
                    self.save_method_state(folder)
                arguments = folder / TRAINING_ARGS_NAME
                if self.args.should_save and arguments.is_file():  # as they are, for whoever goes on with them
                    with with_settings(self.args, save_total_limit=limit, push_to_hub=push):
                        torch.save(self.args, arguments)
                self._write_record(folder)
                self._saved_step, self._just_saved = self.state.global_step, folder
            except (RankLost, RefusedConfiguration):
                raise
            except (Exception, CheckpointException) as error:
                raise checkpoints.not_written(folder, run_dir, error) from error
        if self.args.should_save:
            rotate_checkpoints(str(run_dir), limit, self.state.best_model_checkpoint, use_mtime=True)
        if push:
            try:
                self._push_from_checkpoint(str(folder))
            except OSError as error:
                logger.warning("%s is whole, but was not pushed (%s); the next one will be", folder, error)

    def _remove_stale(self, folder: Path) -> None:
        """What was there is torn, or of a run that went on from an earlier step: no file of it may stay. But callbacks
        may have begun the folder, with what they found in the step's evaluation.
        """
        if not self.args.should_save:
            return
        (folder / checkpoints.FILE).unlink(missing_ok=True)  # not whole until it is written anew
        for path, written in self._before.pop(folder, {}).items():
            with suppress(FileNotFoundError):
                if path.stat().st_ctime_ns == written:
                    path.unlink()

    def _write_record(self, folder: Path) -> None:
        fixed, free = self._settings()
        checkpoints.gather(None)  # every rank has written its files
        own = checkpoints.files_in(folder)
        # what this host has written, shared out among its ranks: older ones are deleted next
        part = slice(self.args.local_process_index, None, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        checkpoints.to_disk(folder / name for name in sorted(own)[part])
        disagreements = torch.stack(self.disagreements).tolist() if self.disagreements else []
        peak = self.peak_memory_bytes()
        ranks = checkpoints.gather((own, float(self._tr_loss), disagreements, self.optimizer_steps()))
        files: dict[str, int] = {}
        # a shared folder may show one rank's files late to another; with save_on_each_node each node has its own
        for seen in [own] if self.args.save_on_each_node else [seen for seen, *_ in ranks]:
            files.update({name: max(size, files.get(name, 0)) for name, size in seen.items()})
        record = checkpoints.Record(
            step=self.state.global_step,
            optimizer_steps=max(steps for *_, steps in ranks),
            world_size=self.args.world_size,
            engine=self.engine_name,
            files=files,
            fixed=json.loads(json.dumps(fixed)),
            free=free,
            totals={} if self.meter is None else {**self.meter.totals(), "peak_bytes": float(peak or 0)},
            unlogged_loss=[loss for _, loss, *_ in ranks],
            unlogged_disagreements=[values for _, _, values, _ in ranks],
            logged_step=self._globalstep_last_logged,
        )
        if self.args.should_save and not self.args.save_only_model:
            record.write(folder)
        checkpoints.gather(None)  # no rank goes on, or ends after SIGTERM, before the record is there
