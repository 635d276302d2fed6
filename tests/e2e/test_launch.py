"""launch/train.py under the deepspeed launcher, two ranks, every config that a CPU can run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT, run
from spawn import free_port
from transformers import AutoModelForSequenceClassification

FLAGS = ["--max_train_samples", "400", "--per_device_train_batch_size", "4", "--max_length", "48", "--seed", "0"]
FLAGS += ["--learning_rate", "1e-4", "--disable_tqdm", "true", "--report_to", "none"]


def deepspeed(config: str, out: Path, *flags: str, ranks: int = 2) -> list[str]:
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks)]
    launcher += ["--master_port", str(free_port()), "launch/train.py", "--deepspeed", config]
    return [*launcher, "--output_dir", str(out), *FLAGS, *flags]


CONFIGS = ["zero0", "zero1", "zero2", "zero3", "zero0_bf16", "zero1_bf16", "zero2_bf16", "zero3_bf16"]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_stage_trains_saves_and_reloads(
    config: str, minilm: str, snippets: str, tmp_path: Path, extensions: Path
) -> None:
    flags = ["--task", snippets, "--model", minilm, "--max_steps", "3", "--max_eval_samples", "32"]
    done = run(deepspeed(f"ds_configs/{config}.json", tmp_path, *flags, "--engine", config[:5]))
    assert done.returncode == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    precision = config[6:] or "fp32"
    assert [metrics[k] for k in ("engine", "world_size", "precision", "steps", "skipped_steps")] == [
        config[:5],
        2,
        precision,
        3,
        0,
    ]
    assert 0.59 < metrics["kept_fraction"] < 0.76
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert sum(p.numel() for p in model.parameters()) > 22_000_000
    assert all(torch.isfinite(p).all() for p in model.parameters())


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
