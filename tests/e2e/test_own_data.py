"""Files of one's own, from training to the model card, on one process."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT
from transformers import pipeline

from rose_ds.cli import main
from rose_ds.experiments import train as train_module
from rose_ds.experiments.evaluation import PREDICTIONS
from rose_ds.experiments.metrics import Metrics

FLAGS = ["--max_length", "16", "--disable_tqdm", "true", "--report_to", "none", "--save_strategy", "no"]


def test_pairs_of_ones_own_from_two_sweeps_to_the_report(two_layers: str, tmp_path: Path) -> None:
    """Trained, attacked and compared; started twice on one store, each of its cells is made once."""
    data, store = tmp_path / "answers.jsonl", tmp_path / "store"
    answers = [(f"Who came {i}?", f"{i} friends came.", "yes") for i in range(30)]
    answers += [(f"Who came {i}?", f"It rained for {i} days.", "no") for i in range(30)]
    lines = [
        {"question": q, "answer": a, "fits": y, **({"note": "x"} if i % 2 else {})}
        for i, (q, a, y) in enumerate(answers)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "rose_ds", "sweep", "--store", str(store), "--methods", "vanilla", "rose-second"]
    command += ["--tasks", "answers", "--train_file", str(data), "--text_columns", "question", "answer"]
    command += ["--label_column", "fits", "--model", two_layers, "--max_steps", "4", "--max_length", "32"]
    command += ["--per_device_train_batch_size", "8", "--eval_steps", "2", "--attack", "pruthi", "--attack_items", "4"]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [sweep.wait(timeout=400) for sweep in both] == [0, 0]
    results = [json.loads(line) for line in (store / "results.jsonl").read_text().splitlines()]
    assert sorted(line["method"] for line in results) == ["rose-second", "vanilla"]
    for line in results:
        log = (store / "cells" / line["cell"] / "log.txt").read_text()
        assert log.count("-m rose_ds train") == log.count("-m rose_ds attack") == 1
        assert "answers.jsonl " in line["settings"]["train_file"] and str(tmp_path) not in json.dumps(line)
        answered = [json.loads(text) for text in (store / "predictions" / f"{line['cell']}.jsonl").open()]
        (label,) = line["metrics"]["under_attack"]
        assert [record["set"] for record in answered] == ["clean", "perturbed", label]
        assert sum(answered[-1]["right"]) / 4 == line["metrics"]["under_attack"][label]
    main(["report", "--store", str(store)])
    page = (store / "report" / "report.md").read_text()
    assert "answers perturbed" in page and "AdvGLUE accuracy" not in page
    assert f"| answers | rose-second | {label} |" in " ".join(page.split())


def rows(count: int, start: int = 0) -> list[tuple[str, str]]:
    moods = {"großartiger": "pos", "schrecklicher": "neg", "gewöhnlicher": "neutral"}
    return [(f"ein {word} Film für {i} Gäste", moods[word]) for i in range(start, start + count) for word in moods]


def test_class_weights_reach_the_loss(
    minilm: str, snippets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Any] = []
    make = train_module.weighted_loss

    def weighted(weights: Any, *args: Any) -> Any:
        loss = make(weights, *args)
        return lambda *given, **more: (used.append(weights), loss(*given, **more))[1]

    monkeypatch.setattr(train_module, "weighted_loss", weighted)
    flags = ["train", "--task", snippets, "--model", minilm, "--method", "vanilla", "--max_steps", "1", *FLAGS]
    flags += ["--per_device_train_batch_size", "4", "--max_train_samples", "100", "--max_eval_samples", "8"]
    main([*flags, "--class_weights", "1", "3", "--output_dir", str(tmp_path)])
    assert used and used[0][1] == pytest.approx(3 * used[0][0])


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
    assert pipeline("text-classification", model=str(out))("großer Film")[0]["label"] in ("neg", "neutral", "pos")

    again = tmp_path / "again"
    columns = ["--text_columns", "body", "--label_column", "mood"]
    main(
        ["evaluate", "--validation_file", str(hard), *columns, "--model", str(out), "--output_dir", str(again), *FLAGS]
    )
    assert Metrics.read(again).glue_accuracy == metrics.advglue_accuracy
    first = [json.loads(line) for line in (out / PREDICTIONS).read_text().splitlines()]
    second = [json.loads(line) for line in (again / PREDICTIONS).read_text().splitlines()]
    assert second[0]["prediction"] == next(r for r in first if r["set"] == "adversarial")["prediction"]

    main(["attack", "--model", str(out), "--max_eval_samples", "6", "--search", "pruthi"])
    (log,) = (out / "attack").glob("pruthi-*-0-of-1.jsonl")
    _, *attacked = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert len(attacked) == 6 and all("Film für" in item["texts"][0] or item["edits"] for item in attacked)
    (under,) = Metrics.read(out).under_attack.items()
    main(["report", str(out), str(again), "--output_dir", str(tmp_path / "report")])
    shown = capsys.readouterr().out
    assert under[0] in shown and f"{under[1]:.2%}" in shown and "| adversarial " in shown

    hard.write_text('{"body": "a film", "mood": "bored"}\n')
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--validation_file", str(hard), *columns, "--model", str(out), "--output_dir", "x", *FLAGS])
    assert stop.value.code == 2
    message = f"{hard}:1: label 'bored' is not one of 'neg', 'neutral', 'pos'"
    assert capsys.readouterr().err.splitlines()[-1] == f"rose-ds evaluate: error: {message}"
