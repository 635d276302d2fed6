"""The evaluation that SIGTERM has cost a run."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from rose_ds.engines.rng import AllRandom
from rose_ds.training import checkpoints


class MissedEvaluation(TrainerCallback):
    """When a run goes on, makes up for the evaluation of the step in which SIGTERM ended it (``StopOnSigterm``), which
    decides about the best checkpoint, an early stop, and a learning rate that waits for a plateau.

    Args:
        trainer: whose callback it is.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """As Trainer does after a step."""
        made = any(
            entry["step"] == state.global_step and any(name.startswith("eval_") for name in entry)
            for entry in state.log_history
        )
        if not checkpoints.gather(_is_due(args, state) and not made)[0]:
            return
        # its data loader draws a number, which the state that was saved lacks
        self.trainer._load_rng_state(str(self.trainer.resumed_folder))
        found = self.trainer._evaluate(None, self.trainer.ignored_keys)
        self.trainer.random_state = AllRandom.now()
        if self.trainer._determine_best_metric(found, None):  # it was saved before that was known
            state.best_model_checkpoint = str(self.trainer.resumed_folder)


def _is_due(args: Any, state: TrainerState) -> bool:
    """Whether Trainer evaluates after the step at which a run goes on."""
    step = state.global_step
    if step and args.eval_strategy == "steps":
        return bool(step >= args.eval_delay and (step % state.eval_steps == 0 or step == state.max_steps))
    if step and args.eval_strategy == "epoch":
        return bool(args.eval_delay <= state.epoch and float(state.epoch).is_integer())
    return False
