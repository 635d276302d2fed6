"""rose-ds sweep with real runs: killed with SIGKILL and started again, it ends where an undisturbed run ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, run

from rose_ds.cli import main
from rose_ds.experiments.evaluation import PREDICTIONS, TRAJECTORY
from rose_ds.experiments.loading import load_data
from rose_ds.experiments.metrics import VERSION, Metrics
from rose_ds.experiments.settings import RunSettings
from rose_ds.experiments.store import Store

#: Three steps to an epoch, so that a resumed run goes through an epoch that it has not begun.
FLAGS = ["--max_train_samples", "24", "--max_eval_samples", "32", "--per_device_train_batch_size", "8"]
FLAGS += ["--max_length", "48", "--learning_rate", "1e-4", "--max_steps", "7", "--save_steps", "2"]
FLAGS += ["--eval_steps", "2", "--train_sampling_strategy", "group_by_length", "--logging_steps", "1"]
FLAGS += ["--per_device_eval_batch_size", "5", "--dataloader_drop_last", "true"]  # evaluation goes through all rows


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def test_killed_and_started_again(minilm: str, snippets: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    definition = tmp_path / "sweep.yaml"
    methods = "{rose-first: , rose-second: {settings: {include: [no_such_layer]}}}"  # the second cannot run
    definition.write_text(f"methods: {methods}\ntasks: [{snippets}]\nsettings: {{model: {minilm}}}\n")
    command = [sys.executable, "-m", "rose_ds", "sweep", "--store", str(store.root), "--config", str(definition)]
    command += ["--jobs", "2", "--attack", "pruthi", "--attack_items", "8", *FLAGS]
    sweep = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 200
        while not list(store.root.glob("cells/*/run/checkpoint-4/rose_checkpoint.json")):
            assert sweep.poll() is None, "the sweep ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        runs = []
        if sweep.poll() is None:
            runs = children(sweep.pid)
            for pid in (sweep.pid, *runs):
                os.kill(pid, signal.SIGKILL)
            sweep.wait()
    assert runs
    assert store.results() == {}
    status = run([*command, "--status"])
    assert "2 cells: 1 failed, 1 incomplete" in status.stdout

    again = run(command)
    assert again.returncode == 1
    assert "2 cells: 1 done, 1 failed" in again.stdout
    assert "failed (exit code 2): snippets rose-second seed 0" in again.stdout
    assert "include pattern 'no_such_layer' matches none" in again.stdout
    ((key, line),) = store.results().items()
    log = (store.cells / key / "log.txt").read_text()
    assert "resuming from" in log.split("--- ")[2]
    assert "checkpoint-4" in log.split("--- ")[2]

    undisturbed = tmp_path / "undisturbed"
    flags = ["--task", snippets, "--model", minilm, "--method", "rose-first", "--seed", "0", *FLAGS]
    main(["train", *flags, "--eval_strategy", "steps", "--save_strategy", "no", "--output_dir", str(undisturbed)])
    answers = {r["set"]: r for r in map(json.loads, (undisturbed / PREDICTIONS).read_text().splitlines())}
    recorded = store.predictions(key)
    attacked = recorded.pop(next(iter(line["metrics"]["under_attack"])))
    assert recorded == answers and len(attacked["right"]) == 8
    assert [json.loads(text) for text in (undisturbed / TRAJECTORY).read_text().splitlines()] == line["trajectory"]
    assert [point["step"] for point in line["trajectory"]] == [2, 4, 6, 7]

    metrics = Metrics(**line["metrics"])
    assert metrics.version == VERSION
    ((attack, left),) = metrics.under_attack.items()
    assert attack.startswith("pruthi 2, 8 items ") and (8 * left).is_integer()
    clean = answers["clean"]
    data = load_data(RunSettings(task=snippets, max_eval_samples=32), ("validation",)).validation
    assert data is not None
    assert (clean["idx"], clean["label"]) == (data["idx"], data["label"]), "each answer under its own row"
    right = sum(p == y for p, y in zip(clean["prediction"], clean["label"], strict=True))
    assert metrics.glue_accuracy == pytest.approx(right / 32)
    assert all(
        max(range(2), key=row.__getitem__) == p for row, p in zip(clean["logits"], clean["prediction"], strict=True)
    )
    assert metrics.hardware["cores"] >= 1
    assert 0 <= (metrics.glue_ece or 0.0) <= 1
    assert set(answers) == {"clean", "perturbed"}
