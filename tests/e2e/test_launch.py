"""launch/train.py under the deepspeed launcher, two ranks, every config that a CPU can run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT, assert_saved_model_answers, deepspeed, run
from spawn import run_ranks
from transformers import AutoModelForSequenceClassification

FLAGS = ["--max_train_samples", "400", "--per_device_train_batch_size", "4", "--max_length", "48", "--seed", "0"]
FLAGS += ["--learning_rate", "1e-4", "--disable_tqdm", "true", "--report_to", "none"]


# --- every config, one after the other in the same two processes: a launch is mostly imports ---

CONFIGS = ["zero0", "zero1", "zero2", "zero3", "zero0_bf16", "zero1_bf16", "zero2_bf16", "zero3_bf16"]
CONFIGS += ["zero2_offload", "zero3_offload"]  # in bf16


#: changes that are refused before any training, and part of the message
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "zero2": (
        "round_robin_gradients",
        {"round_robin_gradients": True},
        "round_robin_gradients reorders the partitions",
    ),
    "zero3": (
        "unsavable",
        {"stage3_gather_16bit_weights_on_model_save": False},
        "stage3_gather_16bit_weights_on_model_save: set it to true",
    ),
}


def train_under_each(rank: int, world: int, folder: str, flags: list[str]) -> dict[str, str]:
    """``rose-ds train`` under each config in turn, up to the first that fails: its traceback."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from rose_ds import cli

    os.chdir(ROOT)
    for config in CONFIGS:
        command = ["train", "--deepspeed", f"ds_configs/{config}.json", "--output_dir", f"{folder}/{config}"]
        try:
            cli.main([*command, *FLAGS, *flags, "--engine", config[:5]])
        except BaseException:
            return {config: traceback.format_exc()}
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(reset_partial_state=True)
    for config, (name, change, _) in REFUSED.items():
        settings = json.loads(Path(f"ds_configs/{config}.json").read_text())
        settings["zero_optimization"].update(change)
        path = Path(folder) / f"{name}-{rank}.json"
        path.write_text(json.dumps(settings))
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
            cli.main(["train", "--deepspeed", str(path), "--output_dir", f"{folder}/{name}", *FLAGS, *flags])
        if rank == 0:
            (Path(folder) / f"{name}.stderr").write_text(said.getvalue())
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(reset_partial_state=True)
    return {}


@pytest.fixture(scope="module")
def trained(
    two_layers: str, snippets: str, tmp_path_factory: pytest.TempPathFactory, extensions: Path
) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--task", snippets, "--model", two_layers, "--max_steps", "3", "--max_eval_samples", "32"]
    failures: dict[str, str] = {}
    for found in run_ranks(train_under_each, 2, str(folder), flags, timeout=560, process_group=False):
        failures.update(found)
    return folder, failures


@pytest.mark.parametrize("config", CONFIGS)
def test_every_stage_trains_saves_and_reloads(trained: tuple[Path, dict[str, str]], config: str) -> None:
    folder, failures = trained[0] / config, trained[1]
    assert config not in failures, failures[config]
    assert (folder / "metrics.json").exists(), f"not reached: {failures}"
    metrics = json.loads((folder / "metrics.json").read_text())
    found = [metrics[k] for k in ("engine", "world_size", "precision", "steps", "skipped_steps")]
    precision = {"": "fp32", "offload": "bf16"}.get(config[6:], config[6:])
    assert found == [config[:5], 2, precision, 3, 0]
    assert 0.59 < metrics["kept_fraction"] < 0.76
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) > 15_000_000
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert_saved_model_answers(folder, "sentence", 1e-3 if precision == "fp32" else 5e-2)


@pytest.mark.parametrize("config", REFUSED)
def test_a_config_that_would_train_or_save_wrongly_is_refused(
    trained: tuple[Path, dict[str, str]], config: str
) -> None:
    name, _, message = REFUSED[config]
    assert trained[1] == {}
    said = (trained[0] / f"{name}.stderr").read_text()
    assert "rose-ds train: error:" in said and message in said
    assert not (trained[0] / name / "metrics.json").exists()


# --- under the launcher ---


@pytest.mark.usefixtures("cold")
def test_zero3_learns_sst2_and_is_measured_on_advglue(minilm: str, glue: str, tmp_path: Path, extensions: Path) -> None:
    flags = ["--task", "sst2", "--data", glue, "--model", minilm, "--method", "rose-ensemble", "--max_steps", "30"]
    flags += ["--max_train_samples", "2000", "--max_eval_samples", "150"]
    flags += ["--per_device_train_batch_size", "8", "--learning_rate", "3e-4", "--output_dir", str(tmp_path)]
    done = run([*deepspeed(), "launch/train.py", "--deepspeed", "ds_configs/zero3.json", *FLAGS, *flags], timeout=500)
    assert done.returncode == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["glue_accuracy"] > 0.6
    assert 0 < metrics["advglue_accuracy"] < 1
    assert "sst2 rose-ensemble: clean" in done.stdout
