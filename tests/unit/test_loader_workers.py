"""Data loaders' workers when a job is told to stop."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from rose_ds.training.callbacks import outlive_sigterm
from rose_ds.training.trainer import RoseTrainer

pytestmark = pytest.mark.fast


def kill(*pids: int) -> None:
    """From a process that is not the workers' parent, as a launcher is not."""
    subprocess.run(["sh", "-c", f"kill -TERM {' '.join(map(str, pids))}"], check=True)


def test_only_their_parent_ends_them() -> None:
    started: list[int] = []
    loader: DataLoader[int] = DataLoader(
        range(40),  # type: ignore[arg-type]
        num_workers=2,
        worker_init_fn=partial(outlive_sigterm, started.append),
    )
    batches: Any = iter(loader)
    found = [next(batches) for _ in range(2)]  # both have started
    workers = batches._workers
    for _ in range(2):  # schedulers signal all processes, and launchers what they have started
        kill(*(worker.pid for worker in workers))
        found += [next(batches) for _ in range(10)]
    assert [int(batch) for batch in found] == list(range(22))
    workers[0].terminate()
    workers[0].join(timeout=20)
    assert workers[0].exitcode == 0
    assert workers[1].is_alive()
    with pytest.raises(RuntimeError, match="exited unexpectedly"):  # and that is noticed as ever
        list(batches)


class Converting:
    """A row of what another program makes of it, which is ended once there is enough."""

    def __init__(self, fork: bool) -> None:
        self.fork = fork

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        if self.fork:
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=False)
            multiprocessing.process.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
            child.start()
            child.terminate()
            child.join(timeout=20)
            return 0 if child.is_alive() else -signal.SIGTERM  # torch ends it with 0
        program = subprocess.Popen(["sleep", "60"])
        program.terminate()
        return program.wait(timeout=20)


@pytest.mark.parametrize("fork", [False, True], ids=["Popen", "fork"])
def test_programs_that_they_start_hear_it(fork: bool) -> None:
    """A blocked signal stays blocked in what a process starts."""
    loader: DataLoader[int] = DataLoader(
        Converting(fork),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=1,
        worker_init_fn=partial(outlive_sigterm, None),
    )
    assert list(loader) == [-signal.SIGTERM] * 2


def with_a_thread(worker: int) -> None:
    """As native libraries start theirs, before a worker is told anything; it blocks no signal."""
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    outlive_sigterm(None, worker)


def test_a_worker_with_threads_of_before_is_ended(tmp_path: Path) -> None:
    loader: DataLoader[int] = DataLoader(range(4), num_workers=1, worker_init_fn=with_a_thread)  # type: ignore[arg-type]
    batches: Any = iter(loader)
    next(batches)
    (worker,) = batches._workers
    worker.terminate()
    worker.join(timeout=20)
    assert worker.exitcode is not None


def test_those_of_the_trainer(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    rows = [{"input_ids": [1, 2], "labels": i % 2} for i in range(16)]
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", dataloader_num_workers=1)
    args.per_device_train_batch_size = args.per_device_eval_batch_size = 1
    trainer = RoseTrainer(BertForSequenceClassification(config), args, train_dataset=rows, eval_dataset=rows)  # type: ignore[arg-type]
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        there = psutil.Process().children()
        batches = iter(loader)
        next(batches)
        (worker,) = set(psutil.Process().children()) - set(there)
        kill(worker.pid)
        assert not psutil.wait_procs([worker], timeout=0.5)[0]
        assert len(list(batches)) == 15
