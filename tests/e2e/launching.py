"""Starting the project's programs as a user does, and the files they read."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from spawn import free_port

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
NURSERY = Path(__file__).parent / "warm"


def torchrun(ranks: int = 2) -> list[str]:
    return [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", str(free_port())]


def deepspeed(ranks: int = 2) -> list[str]:
    return [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port())]


def accelerate(config: str, folder: Path, **settings: Any) -> list[str]:
    """accelerate launch with a config of ds_configs, made to run on CPUs; ``settings`` are over the config's."""
    path = folder / config
    path.write_text(
        yaml.safe_dump({**yaml.safe_load((ROOT / "ds_configs" / config).read_text()), "use_cpu": True, **settings})
    )
    launch = [str(BIN / "accelerate"), "launch", "--config_file", str(path), "--main_process_port", str(free_port())]
    return [*launch, "tests/e2e/scripts/cpu_fsdp.py"]


def rows_file(dataset: Any, path: Path, count: int) -> Path:
    """A CSV file with ``count`` rows from all over a dataset: sentence and label."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence", "label"])
        step = len(dataset) // count
        writer.writerows([row["sentence"], row["label"]] for row in dataset.select(range(0, step * count, step)))
    return path


def assert_saved_model_answers(folder: Path, text: str, tolerance: float) -> None:
    """The model that was saved is the one that was measured: its logits on the clean rows are the run's.

    Args:
        text: the column with the sentences.
    """
    from rose_ds.attack.classifier import Classifier
    from rose_ds.experiments.loading import load_data, settings_of

    settings = settings_of(str(folder), {})
    data = load_data(settings, ("validation",))
    assert data.validation is not None
    wanted = json.loads((folder / "predictions.jsonl").read_text().splitlines()[0])
    assert wanted["set"] == "clean" and len(wanted["idx"]) == len(data.validation)
    model = Classifier(str(folder), data.spec, max_length=settings.max_length, batch_size=8)
    np.testing.assert_allclose(model.predict(data.validation[text]), wanted["logits"], atol=tolerance)


def run(command: list[str], timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command from the repository's root; its output is shown where it fails.

    Past ``timeout`` seconds the command and all that it started are killed.
    """
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path, "TOKENIZERS_PARALLELISM": "false", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        print(out[-4000:], err[-6000:], sep="\n")
        raise
    if process.returncode:
        print(out[-4000:], err[-6000:], sep="\n")
    return subprocess.CompletedProcess(command, process.returncode, out, err)
