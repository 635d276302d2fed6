"""launch/train.py under the deepspeed launcher, two ranks, every config that a CPU can run."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import pytest
import torch
from launching import ROOT, run
from spawn import free_port, run_ranks
from transformers import AutoModelForSequenceClassification

FLAGS = ["--max_train_samples", "400", "--per_device_train_batch_size", "4", "--max_length", "48", "--seed", "0"]
FLAGS += ["--learning_rate", "1e-4", "--disable_tqdm", "true", "--report_to", "none"]


def deepspeed(config: str, out: Path, *flags: str, ranks: int = 2) -> list[str]:
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks)]
    launcher += ["--master_port", str(free_port()), "launch/train.py", "--deepspeed", config]
    return [*launcher, "--output_dir", str(out), *FLAGS, *flags]


# --- every config, one after the other in the same two processes: a launch is mostly imports ---

CONFIGS = ["zero0", "zero1", "zero2", "zero3", "zero0_bf16", "zero1_bf16", "zero2_bf16", "zero3_bf16"]


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
    return {}


@pytest.fixture(scope="module")
def trained(
    minilm: str, snippets: str, tmp_path_factory: pytest.TempPathFactory, extensions: Path
) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--task", snippets, "--model", minilm, "--max_steps", "3", "--max_eval_samples", "32"]
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
    assert found == [config[:5], 2, config[6:] or "fp32", 3, 0]
    assert 0.59 < metrics["kept_fraction"] < 0.76
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) > 22_000_000
    assert all(torch.isfinite(p).all() for p in model.parameters())


# --- under the launcher ---


def test_zero3_learns_sst2_and_is_measured_on_advglue(minilm: str, glue: str, tmp_path: Path, extensions: Path) -> None:
    flags = ["--task", "sst2", "--data", glue, "--model", minilm, "--method", "rose-ensemble", "--max_steps", "60"]
    flags += ["--max_train_samples", "2000", "--max_eval_samples", "300"]
    flags += ["--per_device_train_batch_size", "8", "--learning_rate", "2e-4"]
    done = run(deepspeed("ds_configs/zero3.json", tmp_path, *flags), timeout=500)
    assert done.returncode == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["glue_accuracy"] > 0.6
    assert 0 < metrics["advglue_accuracy"] < 1
    assert "sst2 rose-ensemble: clean" in done.stdout


def test_a_config_that_scrambles_gradients_is_refused_before_training(
    minilm: str, snippets: str, tmp_path: Path, extensions: Path
) -> None:
    config = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    config["zero_optimization"]["round_robin_gradients"] = True
    path = tmp_path / "round_robin.json"
    path.write_text(json.dumps(config))
    done = run(deepspeed(str(path), tmp_path / "out", "--task", snippets, "--model", minilm, "--max_steps", "3"))
    assert done.returncode != 0
    assert "round_robin_gradients reorders the partitions" in done.stderr
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_zero3_that_could_not_save_is_refused(minilm: str, snippets: str, tmp_path: Path, extensions: Path) -> None:
    config = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    del config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    path = tmp_path / "unsavable.json"
    path.write_text(json.dumps(config))
    done = run(deepspeed(str(path), tmp_path / "out", "--task", snippets, "--model", minilm, "--max_steps", "3"))
    assert done.returncode != 0
    assert "stage3_gather_16bit_weights_on_model_save: set it to true" in done.stderr
