"""How often two dropout passes give an item two answers (Table 4)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from rose_ds.analysis.load import Batch, logits_of
from rose_ds.engines.rng import RngState, replay
from rose_ds.experiments.evaluation import write_lines
from rose_ds.training.records import may_be_lost

FILE = "disagreement.jsonl"


@torch.inference_mode()
def disagreement(module: nn.Module, batches: Sequence[Batch], draws: int = 1, seed: int = 0) -> list[float]:
    """Of ``draws`` pairs of passes with dropout on: the fraction of rows whose two answers differ.

    The model's mode and the random state are those from before afterwards.

    Raises:
        ValueError: no two passes differ in any logit: the model has no dropout.
    """
    training = {m: m.training for m in module.modules()}
    found, moved = [], False
    try:
        module.train()
        with replay(RngState.now()):
            torch.manual_seed(seed)
            for _ in range(draws):
                different = rows = 0
                for batch in batches:
                    a, b = (logits_of(module, batch) for _ in range(2))
                    different += int((a.argmax(-1) != b.argmax(-1)).sum())
                    moved = moved or not torch.equal(a, b)
                    rows += len(a)
                found.append(different / rows)
    finally:
        for m, mode in training.items():
            m.training = mode
    if not moved:
        raise ValueError("two passes with dropout on give the same logits everywhere: the model has no dropout")
    return found


class DisagreementCallback(TrainerCallback):
    """Measures it on a set after certain optimizer steps, on any engine, and writes FILE: step and fraction a line.

    Training goes on with the random numbers that it would have had. Lines of later steps, of a run that was killed and
    goes on from a checkpoint, are taken out.
    """

    def __init__(self, trainer: Any, rows: Any, steps: Sequence[int], folder: Path) -> None:
        self.trainer, self.rows, self.steps, self.path = trainer, rows, frozenset(steps), folder / FILE
        self.found: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Go on with what a resumed run has measured."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        self.found = [line for line in map(json.loads, lines) if line["step"] <= state.global_step]

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure, if this is one of the steps."""
        if state.global_step not in self.steps:
            return
        self.found.append({"step": state.global_step, "disagreement": self._measure(args.seed)})
        if state.is_world_process_zero:
            with may_be_lost(self.path):
                write_lines(self.path, self.found)

    def _measure(self, seed: int) -> float:
        model, accelerator = self.trainer.model_wrapped, self.trainer.accelerator
        different = rows = 0
        model.train()
        with replay(RngState.now()), torch.no_grad():
            torch.manual_seed(seed + accelerator.process_index)
            for batch in self.trainer.get_eval_dataloader(self.rows):
                inputs = self.trainer._prepare_inputs(batch)
                a, b = (logits_of(model, inputs).argmax(-1) for _ in range(2))
                flags = accelerator.gather_for_metrics(a != b)
                different, rows = different + int(flags.sum()), rows + len(flags)
        return different / rows
