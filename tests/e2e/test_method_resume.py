"""What a method keeps over a run goes through RoseTrainer's checkpoints, on ranks."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from habits import DRY, bert, count_steps, trainer
from spawn import run_ranks
from torch import Tensor
from torch_jobs import message_of

from rose_ds import RoseConfig

ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ddp": {"ddp_backend": "gloo"},
    "zero2": {"deepspeed": {**ZERO, "zero_optimization": {"stage": 2}}},
    "zero3": {
        "deepspeed": {**ZERO, "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}
    },
}
METHODS: dict[str, dict[str, Any]] = {
    "child-tuning": {"rose": RoseConfig(strategy="child-tuning", keep_first=0.3)},
    "risk-average": {"rose": RoseConfig(strategy="first", risk_ema=0.7, risk_every=3)},
    "smart-average": {
        "rose": RoseConfig(strategy="none"),
        "objective": {"name": "smart", "proximal": 1.0, "init_std": 1e-2, "step_size": 1.0},
    },
}


def once(folder: Path, engine: str, method: str, resume: Path | None = None, **model: Any) -> dict[str, Tensor]:
    """The weights after four steps, of which two may have been another run's."""
    more = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, **ENGINES[engine]}
    if engine == "plain":
        more["per_device_train_batch_size"] = 8  # as many rows as two ranks take
    torch.manual_seed(1)
    made = trainer(folder, bert(**model), more=more, **METHODS[method])
    steps = count_steps(made)
    made.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert steps == ([1, 2, 3, 4] if resume is None else [3, 4])  # a run that began anew would end alike
    return {name: p.clone() for name, p in made.stepper.gather_parameters().items()}


def on_ranks(rank: int, world: int, folder: str, engine: str) -> dict[str, bool]:
    same = {}
    for method in METHODS:
        at = Path(folder) / method
        whole = once(at / "whole", engine, method)
        again = once(at / "again", engine, method, at / "whole" / "checkpoint-2")
        same[method] = all(torch.equal(p, again[name]) for name, p in whole.items())
    return same


def apart(rank: int, world: int, folder: str) -> str:
    socket.gethostname = lambda: f"host-{rank}"
    more = {"max_steps": 1, "save_on_each_node": True, **ENGINES["ddp"]}
    return message_of(trainer(Path(folder), more=more, **METHODS["child-tuning"]).train)


def test_hosts_that_keep_their_checkpoints_to_themselves(tmp_path: Path) -> None:
    for message in run_ranks(apart, 2, str(tmp_path), process_group=False):
        assert "save_on_each_node=True leaves each host the files of its own ranks" in message


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_resumed_is_uninterrupted(engine: str, extensions: Path, tmp_path: Path) -> None:
    for same in run_ranks(on_ranks, 2, str(tmp_path), engine, process_group=False, timeout=400):
        assert all(same.values()), same


def moved(rank: int, world: int, folder: str, before: str, now: str) -> dict[str, bool]:
    """Whether a run goes on with the checkpoint that another engine wrote as if it had been its own."""
    same = {}
    for method in METHODS:
        at = Path(folder) / method
        whole = once(at / "whole", now, method)
        once(at / "before", before, method)
        again = once(at / "again", now, method, at / "before" / "checkpoint-2")
        same[method] = all(torch.allclose(p, again[name], atol=1e-5) for name, p in whole.items())
    return same


@pytest.mark.parametrize(("before", "now"), [("zero2", "zero3"), ("zero3", "zero2")])
def test_resumed_on_another_stage(before: str, now: str, extensions: Path, tmp_path: Path) -> None:
    for same in run_ranks(moved, 2, str(tmp_path), before, now, process_group=False, timeout=400):
        assert all(same.values()), same


def from_one_process(rank: int, world: int, folder: str) -> dict[str, Tensor]:
    at = Path(folder)
    return once(at / "again", "ddp", "child-tuning", at / "whole" / "checkpoint-2", **DRY)


def test_resumed_on_more_ranks(tmp_path: Path) -> None:
    """One process's run goes on with two ranks, each with half of the rows, and ends where it would have ended."""
    whole = once(tmp_path / "whole", "plain", "child-tuning", **DRY)
    for again in run_ranks(from_one_process, 2, str(tmp_path), process_group=False, timeout=400):
        for name, p in whole.items():
            torch.testing.assert_close(again[name], p, atol=1e-5, rtol=1e-4, msg=name)
