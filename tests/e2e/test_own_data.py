"""Files of one's own, from training to the model card, on one process."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from transformers import pipeline

from rose_ds.cli import main
from rose_ds.experiments.evaluation import PREDICTIONS
from rose_ds.experiments.metrics import Metrics

FLAGS = ["--max_length", "16", "--disable_tqdm", "true", "--report_to", "none", "--save_strategy", "no"]


def rows(count: int, start: int = 0) -> list[tuple[str, str]]:
    moods = {"great": "pos", "awful": "neg", "usual": "neutral"}
    return [(f"{word} film, number {i}", moods[word]) for i in range(start, start + count) for word in moods]


def test_three_classes_of_ones_own(
    minilm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, hard = tmp_path / "reviews.csv", tmp_path / "hard.jsonl"
    train.write_text("\ufeffbody,mood\r\n" + "".join(f'"{t}",{y}\r\n' for t, y in rows(60)), encoding="utf-8")
    hard.write_text("".join(json.dumps({"body": f"@x1 {t}", "mood": y}) + "\n" for t, y in rows(4, 70)))
    out = tmp_path / "model"
    flags = ["train", "--train_file", str(train), "--adversarial_file", str(hard), "--text_columns", "body"]
    flags += ["--label_column", "mood", "--class_weights", "1", "2", "1", "--model", minilm, "--method", "rose-first"]
    flags += ["--max_steps", "12", "--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "8"]
    flags += ["--learning_rate", "1e-3", "--output_dir", str(out), *FLAGS]
    monkeypatch.setattr("sys.argv", ["rose-ds", *flags])
    main(flags)
    metrics = Metrics.read(out)
    assert metrics.task == "reviews"
    assert metrics.config["class_weights"] == pytest.approx([0.75, 1.5, 0.75], rel=0.1)
    assert metrics.advglue_accuracy is not None
    assert metrics.perturbed_accuracy is not None
    assert (metrics.glue_accuracy or 0) > 0.5  # chance is a third

    card = (out / "README.md").read_text()
    assert "Labels by id: neg, neutral, pos." in card
    assert shlex.join(["rose-ds", *flags]) in card
    assert f"| clean dev set | {metrics.glue_accuracy:.2%} | {metrics.glue_ece:.2%} |" in card
    assert pipeline("text-classification", model=str(out))("great film")[0]["label"] in ("neg", "neutral", "pos")

    again = tmp_path / "again"
    columns = ["--text_columns", "body", "--label_column", "mood"]
    main(
        ["evaluate", "--validation_file", str(hard), *columns, "--model", str(out), "--output_dir", str(again), *FLAGS]
    )
    assert Metrics.read(again).glue_accuracy == metrics.advglue_accuracy
    first = [json.loads(line) for line in (out / PREDICTIONS).read_text().splitlines()]
    second = [json.loads(line) for line in (again / PREDICTIONS).read_text().splitlines()]
    assert second[0]["prediction"] == next(r for r in first if r["set"] == "adversarial")["prediction"]

    hard.write_text('{"body": "a film", "mood": "bored"}\n')
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--validation_file", str(hard), *columns, "--model", str(out), "--output_dir", "x", *FLAGS])
    assert stop.value.code == 2
    message = f"{hard}:1: label 'bored' is not one of 'neg', 'neutral', 'pos'"
    assert capsys.readouterr().err.splitlines()[-1] == f"rose-ds evaluate: error: {message}"
