"""What RoseTrainer does between steps: its progress bar, its logs, its measurements, and a checkpoint on SIGTERM."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length

from rose_ds.exchange import explaining_lost_ranks
from rose_ds.training.records import may_be_lost
from rose_ds.training.step_report import StepReport


class Reporting(Protocol):
    """A trainer whose last step's report can be asked for."""

    @property
    def last_report(self) -> StepReport | None:
        """None before the first step."""


class RoseProgressCallback(ProgressCallback):
    """Trainer's bar, with the loss, the kept fraction and the thresholds at its end."""

    def __init__(self, trainer: Reporting, max_str_len: int = 100) -> None:
        super().__init__(max_str_len)
        self.trainer = trainer

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar."""
        if state.is_world_process_zero:
            self.training_bar.set_postfix(self._numbers(state), refresh=False)
        super().on_step_end(args, state, control, **kwargs)

    def _numbers(self, state: TrainerState) -> dict[str, str]:
        numbers = {}
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if losses:
            numbers["loss"] = f"{losses[-1]:.3f}"
        report = self.trainer.last_report
        if report is not None and report.kept_fraction is not None:
            numbers["kept"] = f"{report.kept_fraction:.0%}"
            for name, tau in (("tau1", report.tau_first), ("tau2", report.tau_second)):
                if tau is not None:
                    numbers[name] = f"{tau:.2g}" if math.isfinite(tau) else str(tau)
        return numbers

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """On a terminal nothing for training steps, whose numbers are on the bar; all else as Trainer prints it."""
        if logs is None or "loss" not in logs or not sys.stderr.isatty():
            super().on_log(args, state, control, logs=logs, **kwargs)

    def on_prediction_step(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Only where a length is known, as Trainer."""
        if eval_dataloader is not None and has_length(eval_dataloader):
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)


class RoseTensorBoardCallback(TensorBoardCallback):
    """Trainer's; its event file is a record. A writer whose file cannot be written stays broken: it is let go."""

    def __init__(self, tb_writer: Any = None) -> None:
        super().__init__(tb_writer)
        self.lost = False

    def on_train_begin(self, args: Any, *rest: Any, **kwargs: Any) -> None:
        """Trainer's."""
        self._write(args, super().on_train_begin, *rest, **kwargs)

    def on_log(self, args: Any, *rest: Any, **kwargs: Any) -> None:
        """Trainer's."""
        self._write(args, super().on_log, *rest, **kwargs)

    def on_train_end(self, args: Any, *rest: Any, **kwargs: Any) -> None:
        """Trainer's."""
        self._write(args, super().on_train_end, *rest, **kwargs)

    def _write(self, args: Any, method: Any, *rest: Any, **kwargs: Any) -> None:
        if self.lost:
            return
        self.lost = True
        with may_be_lost(self.logging_dir or args.output_dir):
            method(args, *rest, **kwargs)
            self.lost = False


class StepMeter(TrainerCallback):
    """Wall-clock seconds of each optimizer step, and what its masks kept, over all processes that a run took."""

    def __init__(self, trainer: Reporting) -> None:
        self.trainer = trainer
        self.step_seconds: list[float] = []
        """Of this process's steps."""
        self._totals = {"seconds": 0.0, "skipped": 0.0, "kept": 0.0, "masked_steps": 0.0}
        self._begin = self._start = 0.0

    @property
    def skipped(self) -> int:
        """Steps that changed nothing."""
        return int(self._totals["skipped"])

    @property
    def kept_fraction(self) -> float | None:
        """Mean over the steps with a mask of the fraction of eligible parameters kept."""
        count = self._totals["masked_steps"]
        return self._totals["kept"] / count if count else None

    @property
    def earlier_seconds(self) -> float:
        """Seconds trained by the processes before this one."""
        return self._totals["seconds"]

    @property
    def median_step_seconds(self) -> float | None:
        """Of this process's steps but the first two; of an earlier process where this one has taken no more."""
        if len(self.step_seconds) < 3 and "step_seconds" in self._totals:
            return self._totals["step_seconds"]
        return statistics.median(self.step_seconds[2:] or self.step_seconds) if self.step_seconds else None

    @property
    def earlier_peak_bytes(self) -> int:
        """Most memory that a rank of an earlier process held; 0 where there was none."""
        return int(self._totals.get("peak_bytes", 0))

    def totals(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        median = self.median_step_seconds
        timed = {} if median is None else {"step_seconds": median}
        return {**self._totals, **timed, "seconds": self.earlier_seconds + _now() - self._begin}

    def restore(self, totals: dict[str, float]) -> None:
        """Go on from a checkpoint's."""
        self._totals.update(totals)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the clock of this process's training."""
        self._begin = _now()

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the clock of a step."""
        self._start = _now()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock."""
        self.step_seconds.append(_now() - self._start)
        report = self.trainer.last_report
        if report is not None:
            self._totals["skipped"] += report.skipped
            if report.kept_fraction is not None:
                self._totals["kept"] += report.kept_fraction
                self._totals["masked_steps"] += 1


class StopOnSigterm(TrainerCallback):
    """On SIGTERM every rank finishes the same step, all save one checkpoint together, and training stops.

    Not transformers' enable_jit_checkpoint, which is sound in one process only: a signal reaches ranks in different
    steps (the deepspeed launcher even waits for one rank to end before it signals the next), and there each rank starts
    to save where its own signal found it, in collectives that the others never join. It may also save between a step's
    gradients and its update, with the step's random numbers already drawn, so that a resumed run is another run.

    Here ranks exchange one number at the end of each step. With save_strategy="no", outside the main thread, or where a
    program handles SIGTERM by itself, nothing is changed.
    """

    def __init__(self) -> None:
        self.requested = False
        """This process was signalled."""
        self.stopping = False
        """Training stops at this step, on every rank."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM inside the block. Later ones are ignored: launchers repeat what a scheduler has sent."""
        self.requested = self.stopping = False
        default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if not default or threading.current_thread() is not threading.main_thread():
            yield
            return

        def request(*_: Any) -> None:
            self.requested = True

        signal.signal(signal.SIGTERM, request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Agree; then save and stop, without the evaluation that may be due: a scheduler soon sends SIGKILL."""
        if args.save_strategy != "no" and self._any_rank(args, state):
            self.stopping = control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """An epoch that was broken off has not ended."""
        if self.stopping:
            control.should_save = control.should_evaluate = control.should_log = False

    def _any_rank(self, args: Any, state: TrainerState) -> bool:
        if args.world_size == 1:
            return self.requested
        requested = torch.tensor([int(self.requested)], device=args.device)
        with explaining_lost_ranks(lambda: f"step {state.global_step}"):
            dist.all_reduce(requested, op=dist.ReduceOp.MAX)
        return bool(requested.item())


def outlive_sigterm(then: Callable[[int], Any] | None, worker: int) -> None:
    """When a data loader's worker starts: from now on only its parent ends it by SIGTERM, and no launcher or scheduler.
    What it starts by ``subprocess`` or by forking hears the signal as ever.

    Args:
        then: the worker_init_fn that was there.
        worker: its number.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    os.register_at_fork(after_in_child=partial(_hear_sigterm, os.getpid()))
    execute: Any = subprocess.Popen._execute_child  # type: ignore[attr-defined]  # which forks past register_at_fork

    def execute_child(*args: Any, **kwargs: Any) -> Any:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        try:
            return execute(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    subprocess.Popen._execute_child = execute_child  # type: ignore[attr-defined]
    threading.Thread(target=_obey_parent, daemon=True).start()
    if then is not None:
        then(worker)


def _hear_sigterm(worker: int) -> None:
    """In a process that the worker has forked, and in none of that one's."""
    if os.getppid() == worker:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _obey_parent() -> None:
    parent = multiprocessing.parent_process()  # which is not getppid()'s under a fork server
    while parent is not None and signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent.pid and parent.is_alive():
        pass
    os._exit(0)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
