"""Presets: the published numbers, what they fill in and what they leave alone."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest

from rose_ds import RoseConfig
from rose_ds.cli import train as command
from rose_ds.cli.arguments import Parser, RunArguments
from rose_ds.experiments import train as experiment
from rose_ds.experiments.methods import method_named
from rose_ds.experiments.metrics import Metrics
from rose_ds.experiments.presets import PUBLISHED, published
from rose_ds.experiments.settings import MethodSettings, RunSettings, from_preset
from rose_ds.objectives import FreeLB, Smart

pytestmark = pytest.mark.fast

#: As ROSE's authors list them: task -> learning rate and kept percentage of First, Second and Ensemble.
BASE = {
    "qnli": ((2e-5, 70), (1e-5, 40), (1e-5, 90)),
    "qqp": ((2e-5, 70), (1e-4, 60), (5e-5, 75)),
    "rte": ((4e-5, 80), (4e-5, 60), (4e-5, 80)),
    "sst2": ((2e-5, 60), (1e-4, 30), (5e-5, 40)),
}
LARGE = {
    "qnli": ((3e-5, 50), (1e-5, 50), (1e-5, 30)),
    "qqp": ((2e-5, 70), (1e-5, 60), (1e-5, 80)),
    "rte": ((1e-5, 80), (2e-5, 50), (1e-5, 85)),
    "sst2": ((4e-5, 70), (1e-5, 50), (1e-5, 70)),
}


def filled(*flags: str, ranks: int = 1) -> tuple[RunSettings, MethodSettings, Any, dict[str, Any]]:
    """Everything that ``rose-ds train`` hands on, and what the preset filled in."""
    parser = Parser("train", "", RunSettings, MethodSettings, RunArguments)
    arguments = [*flags, "--use_cpu", "true"]
    found = from_preset(parser.given(arguments), ranks)
    assert found is not None
    parser.set_defaults(**found.settings)
    run, method, args = parser.settings(arguments)
    return run, method, args, found.settings


@pytest.mark.parametrize(("preset", "table"), [("paper-base", BASE), ("paper-large", LARGE)])
@pytest.mark.parametrize("task", BASE)
@pytest.mark.parametrize("index", range(3))
def test_rose(preset: str, table: dict[str, Any], task: str, index: int) -> None:
    learning_rate, percent = table[task][index]
    strategy = ("first", "second", "ensemble")[index]
    run, method, args, _ = filled("--method", f"rose-{strategy}", "--task", task, "--preset", preset)
    kept = {"first": {"keep_first"}, "second": {"keep_second"}, "ensemble": {"keep_first", "keep_second"}}[strategy]
    assert method.rose() == RoseConfig(
        strategy=strategy, granularity="tensor", gamma=0.5, **dict.fromkeys(kept, percent / 100)
    )
    assert args.learning_rate == learning_rate
    assert args.per_device_train_batch_size == (16 if task == "rte" else 32)
    assert (args.adam_beta2, args.weight_decay, args.num_train_epochs) == (0.98, 0.01, 10)
    assert (args.warmup_steps, run.max_length) == (0, 128)
    assert run.model == preset.replace("paper", "roberta")


FREELB = {
    "sst2": FreeLB(step_size=1e-1, passes=3, init_mag=1.0, max_norm=6e-1),
    "qnli": FreeLB(step_size=1e-1, passes=3, init_mag=2e-1, max_norm=2e-1),
    "qqp": FreeLB(step_size=2e-1, passes=3, init_mag=3.2e-1, max_norm=7e-1),
    "rte": FreeLB(step_size=6e-2, passes=4, init_mag=1.6e-1, max_norm=1.4e-1),  # K = 3 there makes 1 + 3 passes
}


@pytest.mark.parametrize("task", FREELB)
def test_freelb(task: str) -> None:
    _, method, args, _ = filled("--method", "freelb", "--task", task, "--preset", "paper-large")
    assert method.objective() == FREELB[task]
    assert (args.learning_rate, args.weight_decay, args.adam_epsilon, args.max_grad_norm) == (1e-5, 0.1, 1e-6, 0)
    assert (args.adam_beta1, args.adam_beta2, args.num_train_epochs) == (0.9, 0.999, 10)
    assert args.warmup_steps == (0.25 if task == "qqp" else 0.06)
    assert args.per_device_train_batch_size == (16 if task == "rte" else 32)


def test_the_other_methods() -> None:
    _, _, args, _ = filled("--method", "r-drop", "--task", "rte", "--preset", "paper-base")
    assert (args.learning_rate, args.adam_beta2, args.adam_epsilon, args.weight_decay) == (1e-5, 0.98, 1e-6, 0.01)
    assert args.per_device_train_batch_size == 8
    assert round(args.num_train_epochs * 312) == 2036  # RTE's updates, and those of an epoch of 2,490 rows
    _, method, args, _ = filled("--method", "smart", "--task", "sst2", "--preset", "paper-base")
    assert method.objective() == Smart(weight=1.0, steps=1, step_size=1e-3, init_std=1e-5, radius=1.0)
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm, args.warmup_steps) == (5e-5, 0, 1.0, 0.1)
    _, method, args, _ = filled("--method", "child-tuning", "--task", "rte", "--preset", "paper-large")
    assert method.rose() == RoseConfig(strategy="child-tuning", keep_first=0.3)
    assert (args.learning_rate, args.num_train_epochs, args.per_device_train_batch_size) == (4e-5, 3, 16)
    _, _, args, _ = filled("--method", "vanilla", "--task", "rte", "--preset", "paper-large")
    assert (args.learning_rate, args.weight_decay, args.adam_beta2) == (2e-5, 0.1, 0.98)


@pytest.mark.parametrize("key", PUBLISHED, ids="-".join)
def test_every_preset_is_made_of_flags(key: tuple[str, str, str]) -> None:
    preset, name, task = key
    _, method, _, settings = filled("--method", name, "--task", task, "--preset", preset)
    assert method.method == name
    assert len(settings) > 6
    assert PUBLISHED[key].source.startswith("https://github.com/")


def test_a_combination_takes_the_masks_settings_and_the_objectives_constants() -> None:
    run, method, args, _ = filled("--method", "freelb+rose-second", "--task", "qqp", "--preset", "paper-large")
    assert method.objective() == FREELB["qqp"]
    assert method.rose() == RoseConfig(strategy="second", keep_second=0.6, granularity="tensor")
    assert (args.learning_rate, args.weight_decay, args.adam_beta2, run.max_length) == (1e-5, 0.01, 0.98, 128)
    # --objective and --strategy say the same
    same = filled("--objective", "freelb", "--strategy", "second", "--task", "qqp", "--preset", "paper-large")
    assert same[1].objective() == method.objective()
    assert same[1].rose() == method.rose()


NOT_PUBLISHED = [
    ("paper-base", "vanilla", "sst2"),
    ("paper-base", "freelb", "sst2"),
    ("paper-base", "freelb+rose-first", "sst2"),
    ("paper-large", "child-tuning", "qqp"),
    ("paper-large", "r-drop+rose-first", "rte"),
    ("paper-base", "random-mask", "rte"),
    ("paper-base", "r-drop+gallop", "rte"),
    ("paper-base", "rose-first", "snippets"),
]


@pytest.mark.parametrize("key", NOT_PUBLISHED, ids="-".join)
def test_what_was_not_published_is_refused(key: tuple[str, str, str]) -> None:
    preset, method, task = key
    with pytest.raises(ValueError, match="has no published settings") as refused:
        published(preset, method_named(method), task)
    said = str(refused.value)
    assert f"preset {preset} has no published settings for {method} on {task}" in said
    assert "\n" not in said
    assert (
        "paper-base: rose-first, rose-second, rose-ensemble, r-drop, smart (qnli, qqp, rte, sst2); paper-large" in said
    )
    assert "child-tuning (rte)" in said


def test_no_task_is_the_default_task() -> None:
    with pytest.raises(ValueError, match="for rose-ensemble on snippets"):
        filled("--preset", "paper-base")
    with pytest.raises(ValueError, match="unknown task 'sst3'"):
        filled("--preset", "paper-base", "--task", "sst3")
    assert filled("--preset", "paper-base", "--task", "SST-2")[1].rose().keep_second == 0.4
    with pytest.raises(ValueError, match="preset='paper' is not one of"):
        filled("--preset", "paper", "--task", "rte")


def test_what_is_given_stays() -> None:
    _, method, args, settings = filled(
        *("--method", "rose-first", "--task", "rte", "--preset", "paper-base", "--keep-first", "0.5"),
        *("--learning_rate=3e-5", "--max_steps", "7", "--granularity", "element"),
    )
    assert method.rose() == RoseConfig(strategy="first", keep_first=0.5)
    assert (args.learning_rate, args.max_steps, args.weight_decay) == (3e-5, 7, 0.01)
    assert not {"keep_first", "learning_rate", "granularity", "num_train_epochs"} & set(settings)


def test_the_batch_is_that_of_all_ranks() -> None:
    flags = ("--method", "rose-first", "--task", "qnli", "--preset", "paper-base")
    assert filled(*flags, ranks=4)[2].per_device_train_batch_size == 8
    assert filled(*flags, "--gradient_accumulation_steps", "4", ranks=2)[2].per_device_train_batch_size == 4
    assert filled(*flags, "--per_device_train_batch_size", "5", ranks=3)[2].per_device_train_batch_size == 5
    with pytest.raises(ValueError, match=re.escape("batches of 32 rows, which 3 rank(s)")):
        filled(*flags, ranks=3)


@pytest.mark.parametrize(("ranks", "steps"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_a_global_batch_is_kept_on_any_number_of_ranks(ranks: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    args = RunArguments(per_device_train_batch_size=4, use_cpu=True)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    args._accumulate_to(32)
    assert args.gradient_accumulation_steps == steps


def test_a_global_batch_that_cannot_be() -> None:
    flags = ("--method", "rose-first", "--task", "qnli", "--preset", "paper-base", "--global_batch_size", "12")
    args = filled(*flags, "--per_device_train_batch_size", "3")[2]
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (3, 4), "not the preset's 32"
    with pytest.raises(ValueError, match=re.escape("12 is no multiple of 8, the rows that 1 rank(s) take at once")):
        filled(*flags)
    with pytest.raises(ValueError, match="give one of the two"):
        filled(*flags, "--gradient_accumulation_steps", "3")


def test_the_command_fills_in_logs_and_hands_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    seen: list[Any] = []

    def fake(*settings: Any) -> Metrics:
        seen.extend(settings)
        return Metrics(task="rte", model="roberta-base")

    monkeypatch.setattr(experiment, "train", fake)
    caplog.set_level(logging.INFO)
    flags = ["--task", "rte", "--preset", "paper-base", "--weight_decay", "0.1", "--use_cpu", "true"]
    command.run([*flags, "--output_dir", str(tmp_path)])
    run, method, args = seen
    assert run.model == "roberta-base"
    assert (args.learning_rate, args.weight_decay) == (4e-5, 0.1)
    record = experiment._preset(method)
    assert record is not None
    assert record["name"] == "paper-base"
    assert record["source"] == "https://github.com/jiangllan/ROSE"
    assert record["settings"]["per_device_train_batch_size"] == 16
    assert "weight_decay" not in record["settings"]
    assert "preset paper-base for rose-ensemble on rte fills in model=roberta-base, learning_rate=4e-05" in caplog.text
    seen.clear()
    command.run(["--task", "rte", "--output_dir", str(tmp_path), "--use_cpu", "true"])
    assert experiment._preset(seen[1]) is None
    assert seen[0].model == "minilm"
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 rank"):
        command.run([*flags, "--output_dir", str(tmp_path)])
