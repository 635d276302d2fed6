"""The rose-ds command on one process: what it writes, what it refuses, and that a resumed run is the same run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rose_ds import __version__
from rose_ds.cli import main
from rose_ds.experiments.metrics import Metrics
from rose_ds.training.trainer import RoseTrainer

FLAGS = ["--max_train_samples", "400", "--max_eval_samples", "64", "--per_device_train_batch_size", "8"]
FLAGS += ["--max_length", "48", "--learning_rate", "1e-4", "--disable_tqdm", "true", "--logging_steps", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, minilm: str, snippets: str) -> Path:
    out = tmp_path_factory.mktemp("trained")
    main(["train", "--task", snippets, "--model", minilm, "--max_steps", "4", "--output_dir", str(out), *FLAGS])
    return out


def test_train_writes_a_model_and_metrics(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert {k: metrics[k] for k in ("task", "method", "seed", "engine", "world_size", "precision", "steps")} == {
        "task": "snippets",
        "method": "rose-ensemble",
        "seed": 42,
        "engine": "plain",
        "world_size": 1,
        "precision": "fp32",
        "steps": 4,
    }
    assert metrics["advglue_accuracy"] is None
    assert 0 <= metrics["glue_accuracy"] <= 1
    assert 0 <= metrics["perturbed_accuracy"] <= 1
    assert 0.59 < metrics["kept_fraction"] < 0.75  # the first step keeps all by second order: there is no history
    assert metrics["config"]["rose"]["strategy"] == "ensemble"
    assert metrics["config"]["objective"] == {"name": "task"}
    assert metrics["config"]["preset"] is None
    assert (metrics["version"], metrics["status"]) == (4, "done")
    assert metrics["packages"]["rose_ds"] == __version__
    assert (metrics["commit"] is not None) == (ROOT / ".git").exists()
    assert 2**28 < metrics["peak_memory_bytes"] < 2**36
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    logits = model(**AutoTokenizer.from_pretrained(trained)("a fine film", return_tensors="pt")).logits
    assert logits.shape == (1, 2)
    assert torch.isfinite(logits).all()


def test_a_dry_run_says_what_would_happen(
    minilm: str, snippets: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["train", "--task", snippets, "--model", minilm, "--output_dir", str(tmp_path), "--dry_run", *FLAGS]
    main([*flags, "--gradient_accumulation_steps", "3", "--num_train_epochs", "2", "--save_steps", "1"])
    told = capsys.readouterr().out
    for words in (
        "task, ensemble (element) on plain: 48 tensors, 10,621,440 elements eligible",
        "masked in all 10,621,440 of 22,713,986 (46.8%); weights are kept in float32",
        "dropout: Dropout 0.1",
        "effective batch: 8 rows x 1 rank x 3 micro-batches = 24 rows an optimizer step",
        "400 rows, 17 steps an epoch, 34 steps in all (2.0 epochs)",
        "fp32, learning rate 0.0001, linear",
    ):
        assert f"  {words}\n" in told or told.startswith(words) or f"\n{words}" in told
    assert re.search(r"the first step: loss 0\.\d{4}, \d+\.\d\d s, peak memory of a rank [\d,]+ MiB\n", told)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_is_refused_as_the_run_would_be(
    minilm: str, snippets: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the data is read where tokenizer and config say so."""
    flags = ["train", "--model", minilm, "--output_dir", str(tmp_path), "--dry_run"]
    with pytest.raises(SystemExit):
        main([*flags, "--task", "sst2", "--data", str(tmp_path / "nowhere"), "--max_length", "100000"])
    assert "--max_length 100000 is more than the 512 tokens" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*flags, "--task", snippets, "--include", "no.such.*"])
    assert "no.such.*" in capsys.readouterr().err


def test_any_method_trains_and_is_recorded(minilm: str, snippets: str, tmp_path: Path) -> None:
    flags = ["train", "--task", snippets, "--model", minilm, "--max_steps", "2", "--output_dir", str(tmp_path), *FLAGS]
    main([*flags, "--objective", "r-drop", "--strategy", "random", "--rdrop_alpha", "0.5", "--seed", "5"])
    metrics = Metrics.read(tmp_path)
    assert metrics.method == "r-drop+random-mask"
    assert metrics.config["objective"] == {"name": "r-drop", "alpha": 0.5, "kl_reduction": "mean"}
    assert (metrics.config["rose"]["strategy"], metrics.config["rose"]["mask_seed"]) == ("random", 5)
    assert metrics.kept_fraction == pytest.approx(0.6, abs=1e-3)


def test_a_preset_is_recorded(minilm: str, glue: str, tmp_path: Path) -> None:
    flags = ["--task", "sst2", "--data", glue, "--model", minilm, "--max_steps", "1", "--output_dir", str(tmp_path)]
    main(["train", "--preset", "paper-base", "--method", "rose-first", *flags, *FLAGS])
    metrics = Metrics.read(tmp_path)
    preset = metrics.config["preset"]
    assert (preset["name"], preset["settings"]["keep_first"]) == ("paper-base", 0.6)
    assert not {"model", "learning_rate", "max_length", "per_device_train_batch_size"} & set(preset["settings"])
    assert (metrics.config["adam_beta2"], metrics.config["learning_rate"]) == (0.98, 1e-4)
    assert metrics.config["rose"]["granularity"] == "tensor"


def test_tensorboard_has_the_thresholds(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: set[str] = set()
    for folder in {path.parent for path in trained.rglob("events.out.tfevents.*")}:
        events = EventAccumulator(str(folder))
        events.Reload()
        found |= set(events.Tags()["scalars"])
    assert {"train/rose/tau_first", "train/rose/tau_second", "train/rose/kept_first", "train/loss"} <= found


def test_evaluate_measures_the_saved_model_the_same(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        ["evaluate", "--task", "snippets", "--model", str(trained), "--max_eval_samples", "64", "--max_length", "48"]
        + ["--output_dir", str(tmp_path), "--disable_tqdm", "true", "--logging_steps", "2"]
    )
    before, after = Metrics.read(trained), Metrics.read(tmp_path)
    assert after.glue_accuracy == before.glue_accuracy
    assert after.perturbed_accuracy == before.perturbed_accuracy
    assert after.method == "rose-ensemble"
    assert "clean" in capsys.readouterr().out


def test_a_run_resumed_halfway_is_the_uninterrupted_run(
    minilm: str, snippets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    flags = ["train", "--task", snippets, "--model", minilm, "--method", "rose-ensemble", "--save_steps", "2", *FLAGS]
    flags += ["--lr_scheduler_type", "constant", "--seed", "3"]
    main([*flags, "--max_steps", "4", "--output_dir", str(whole)])
    main([*flags, "--max_steps", "2", "--output_dir", str(halves)])
    with pytest.raises(SystemExit):  # an earlier run's checkpoints are not mixed up with a new run's
        main([*flags, "--max_steps", "4", "--output_dir", str(halves)])
    taken: list[int] = []
    step = RoseTrainer.training_step

    def counted(self: RoseTrainer, *args: Any) -> Any:
        taken.append(self.state.global_step)
        return step(self, *args)

    monkeypatch.setattr(RoseTrainer, "training_step", counted)
    main([*flags, "--max_steps", "4", "--output_dir", str(halves), "--resume", "auto"])
    assert taken == [2, 3]  # a run that began anew would end alike
    one, other = load_file(whole / "model.safetensors"), load_file(halves / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_report_prints_a_table_and_draws_a_chart(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    main(["report", str(trained), str(trained), "--output_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("| snippets | rose-ensemble | plain x1") == 2
    assert len(json.loads((tmp_path / "comparison.json").read_text())) == 2
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


BAD = [
    (["--method", "rose-third"], "method='rose-third' is not one of"),
    (["--strategy", "third"], "strategy='third' is not one of"),
    (["--strategy", "first", "--method", "rose-second"], "give one of the two"),
    (["--objective", "rdrop"], "objective='rdrop' is not one of"),
    (["--rdrop_alpha", "0.5"], "--rdrop_alpha is a constant of objective r-drop"),
    (["--preset", "paper-base"], "preset paper-base has no published settings for rose-ensemble on snippets"),
    (["--keep_first", "0"], "keep_first=0.0 must be in (0, 1]"),
    (["--keep_second", "1.5"], "keep_second=1.5 must be in (0, 1]"),
    (["--gamma", "-0.1"], "gamma=-0.1 must be in [0, 1]"),
    (["--granularity", "row"], "granularity='row' is not one of"),
    (["--include", "no_such_layer"], "include pattern 'no_such_layer' matches none"),
    (["--include", "la(yer"], "is not a regular expression"),
    (["--task", "sst3"], "unknown task 'sst3'; choose one of"),
    (["--task", "sst2", "--data", "no/such/folder"], "no/such/folder"),
    (["--model", "./no/such/model"], "model folder ./no/such/model does not exist"),
    (["--engine", "zero2"], "--engine zero2 was asked for, but this run is on plain"),
    (["--resume", "always"], "resume='always' must be auto"),
    (["--resume_from_checkpoint", "nowhere"], "nowhere is not a folder"),
    (["--deepspeed", "no.json"], "no.json: no such file"),
    (["--max_eval_samples", "0"], "max_eval_samples=0 must be at least 1"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_is_one_clear_error(
    flags: list[str], message: str, minilm: str, snippets: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    defaults = ["--task", snippets, "--model", minilm, "--max_steps", "1", "--output_dir", str(tmp_path), *FLAGS]
    with pytest.raises(SystemExit) as stop:
        main(["train", *defaults, *flags])
    assert stop.value.code == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert printed[-1].startswith("rose-ds train: error: ")
    assert message in printed[-1]
    assert not (tmp_path / "metrics.json").exists()


def test_a_model_without_dropout_is_refused(
    minilm: str, snippets: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rose_ds.experiments.models import resolve

    where = resolve(minilm)
    model = AutoModelForSequenceClassification.from_pretrained(
        where, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0
    )
    model.save_pretrained(tmp_path / "dry")
    AutoTokenizer.from_pretrained(where).save_pretrained(tmp_path / "dry")
    flags = ["--task", snippets, "--model", str(tmp_path / "dry"), "--max_steps", "1", *FLAGS]
    with pytest.raises(SystemExit):
        main(["train", *flags, "--method", "rose-first", "--output_dir", str(tmp_path / "out")])
    assert "every dropout probability of this model is 0" in capsys.readouterr().err
    main(["train", *flags, "--method", "rose-second", "--output_dir", str(tmp_path / "out")])
    assert Metrics.read(tmp_path / "out").method == "rose-second"


def test_a_corrupt_row_names_its_file_and_line(minilm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "glue" / "SST-2"
    folder.mkdir(parents=True)
    (folder / "train.tsv").write_text("sentence\tlabel\na fine film\t1\na dull\tfilm\t0\n")
    (folder / "dev.tsv").write_text("sentence\tlabel\na fine film\t1\n")
    with pytest.raises(SystemExit):
        main(
            [
                "train",
                "--task",
                "sst2",
                "--data",
                str(tmp_path / "glue"),
                "--model",
                minilm,
                "--output_dir",
                str(tmp_path),
            ]
        )
    assert f"{folder / 'train.tsv'}:3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("evaluate", ["--output_dir", "out", "--engine", "ddp"], "--engine: it is about training"),
        ("evaluate", ["--output_dir", "out", "--record_masks", "5"], "--record_masks: it is about training"),
        ("bench", ["--record_masks", "5"], "--record_masks: a measured step records nothing"),
        ("landscape", ["run", "--disagreement_steps", "5"], "--disagreement_steps: a finished model is looked at"),
        ("interpolate", ["a", "b"], "--model: models are named without a flag"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(
    command: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, *flags, *([] if command == "bench" else ["--model", "run"])])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "--record_masks" not in capsys.readouterr().out


def test_a_model_to_evaluate_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--output_dir", "out"])
    assert "the following arguments are required: --model" in capsys.readouterr().err


def test_help_and_version_teach(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--version"], [__version__]),
        (["--help"], ["train", "evaluate", "report"]),
        (["train", "--help"], ["Examples:", "--keep_first", "--max_steps", "ds_configs/zero2_bf16.json"]),
        (["train", "--help"], ["The opposite of --use_cpu."]),
        (["evaluate", "--help"], ["Example:", "--task"]),
        (["report", "--help"], ["comparison.png"]),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        assert all(word in printed for word in words)
