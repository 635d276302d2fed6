"""The analyses from the command line, on two real classifiers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import deepspeed, run, torchrun
from safetensors.torch import load_file

from rose_ds.analysis.disagreement import FILE
from rose_ds.analysis.load import loss_and_accuracy, open_run
from rose_ds.cli import main

METHODS = ("vanilla", "rose-first")


def trained(model: str, method: str, out: Path, *flags: str) -> str:
    """The folder of a classifier of a few steps."""
    flags = ("--task", "snippets", "--model", model, "--method", method, "--output_dir", str(out / method), *flags)
    flags += ("--per_device_train_batch_size", "8", "--max_length", "32", "--learning_rate", "2e-4")
    flags += ("--max_eval_samples", "32", "--disable_tqdm", "true", "--report_to", "none", "--save_strategy", "no")
    main(["train", *flags])
    return str(out / method)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, two_layers: str, snippets: str) -> dict[str, str]:
    out = tmp_path_factory.mktemp("analysed")
    flags = ["--max_steps", "6", "--logging_steps", "3", "--disagreement_steps", "2", "6", "--record_masks", "2"]
    return {method: trained(two_layers, method, out, *flags) for method in METHODS}


def result(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def test_landscape(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*models.values(), "--points", "3", "--rows", "8", "--hessian_rows", "4"]
    main(["landscape", *flags, "--output_dir", str(tmp_path)])
    found = result(tmp_path, "landscape")
    assert list(found["models"]) == list(METHODS)
    for name, folder in models.items():
        opened = open_run(folder, {}, splits=("train",), attention="eager")
        assert opened.settings.max_length == 32  # as in its training
        loss, accuracy = loss_and_accuracy(opened.model, opened.batches("train", 8, 64))
        one = found["models"][name]
        assert (one["loss"][1][1], one["accuracy"][1][1]) == (loss, accuracy)
        assert one["loss_at_model"] == loss
        assert len(one["hessian_eigenvalues"]) == 1
        assert len({value for row in one["loss"] for value in row}) == 9
    assert f"| rose-first | {found['models']['rose-first']['loss_at_model']:.4f} |" in capsys.readouterr().out
    for name in ("landscape.png", "landscape.svg", "landscape.html"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert "https://cdn" not in (tmp_path / "landscape.html").read_text()[:2000]

    command = [*torchrun(2), "-m", "rose_ds", "landscape", *flags, "--eigenvalues", "0"]
    job = run([*command, "--output_dir", str(tmp_path / "two")])
    assert job.returncode == 0
    two = result(tmp_path / "two", "landscape")
    for name in METHODS:
        for row, want in zip(two["models"][name]["loss"], found["models"][name]["loss"], strict=True):
            assert row == pytest.approx(want, rel=1e-6)


def test_landscape_of_sharded_models(models: dict[str, str], tmp_path: Path, extensions: Path) -> None:
    flags = [*models.values(), "--points", "3", "--rows", "24", "--batch_size", "8"]
    main(["landscape", *flags, "--eigenvalues", "0", "--output_dir", str(tmp_path / "whole")])
    command = [*deepspeed(2), "--module", "rose_ds", "landscape", *flags, "--engine", "zero3"]
    job = run([*command, "--output_dir", str(tmp_path / "sharded")], TORCH_EXTENSIONS_DIR=str(extensions))
    assert job.returncode == 0
    assert re.search(r"\| rose-first \| \d\.\d{4} \| [\d.]+% \| - \| - \|", job.stdout)
    whole, sharded = (result(tmp_path / name, "landscape")["models"] for name in ("whole", "sharded"))
    for name in METHODS:
        assert sharded[name]["accuracy"] == whole[name]["accuracy"]
        for row, want in zip(sharded[name]["loss"], whole[name]["loss"], strict=True):
            assert row == pytest.approx(want, rel=1e-5)


def test_an_engine_that_cannot_shard_is_refused(models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for command, engine, message in (
        (["landscape"], "zero1", "engine='zero1' is not for landscape, whose ranks hold whole models: give fsdp2 or"),
        (["landscape"], "zero3", "engine='zero3' shards a model over ranks: start it with torchrun"),
        (["landscape", "--eigenvalues", "2"], "fsdp2", "eigenvalues=2 are found of whole models"),
        (["dropout-disagreement"], "fsdp2", "engine='fsdp2' is not for dropout-disagreement"),
    ):
        with pytest.raises(SystemExit):
            main([command[0], models["vanilla"], *command[1:], "--engine", engine])
        assert message in capsys.readouterr().err


def test_interpolate(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["interpolate", *models.values(), "--points", "5", "--rows", "16", "--output_dir", str(tmp_path)])
    points = {point["a"]: point for point in result(tmp_path, "interpolation")["points"]}
    assert sorted(points) == [-0.5, 0.0, 0.5, 1.0, 1.5]
    for at, folder in zip((0.0, 1.0), models.values(), strict=True):
        opened = open_run(folder, {}, splits=("validation",))
        for name in ("validation", "perturbed"):
            loss, accuracy = loss_and_accuracy(opened.model, opened.batches(name, 16, 64))
            assert (points[at][f"{name}_loss"], points[at][f"{name}_accuracy"]) == (loss, accuracy)
    assert "perturbed: " in capsys.readouterr().out
    assert (tmp_path / "interpolation.png").stat().st_size > 10_000
    command = [*torchrun(2), "-m", "rose_ds", "interpolate", *models.values(), "--points", "5", "--rows", "16"]
    job = run([*command, "--engine", "fsdp2", "--output_dir", str(tmp_path / "sharded")])
    assert job.returncode == 0
    sharded = result(tmp_path / "sharded", "interpolation")["points"]
    assert [point["a"] for point in sharded] == sorted(points)
    for point in sharded:
        assert point == pytest.approx(points[point["a"]], rel=1e-5)
    with pytest.raises(SystemExit):
        main(["interpolate", models["vanilla"], "--output_dir", str(tmp_path)])
    assert "a line has two ends: give two models, found 1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def undecided(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose answers lie on both sides of the fence, as near as they can be."""
    opened = open_run(models["vanilla"], {}, splits=("validation",))
    with torch.no_grad():
        logits = torch.cat(
            [
                opened.model(**{k: v for k, v in b.items() if k != "labels"}).logits
                for b in opened.batches("validation", 32, 64)
            ]
        )
        opened.model.classifier.bias[0] -= (logits[:, 0] - logits[:, 1]).median()  # type: ignore[index,operator,union-attr]
    folder = tmp_path_factory.mktemp("undecided")
    opened.model.save_pretrained(folder)  # type: ignore[operator]
    opened.tokenizer.save_pretrained(folder)
    return str(folder)


def test_dropout_disagreement(models: dict[str, str], undecided: str, snippets: str, tmp_path: Path) -> None:
    flags = ["--task", snippets, "--max_length", "32", "--rows", "32", "--draws", "3", "--output_dir", str(tmp_path)]
    main(["dropout-disagreement", models["rose-first"], undecided, *flags])
    found = list(result(tmp_path, "dropout-disagreement")["models"].values())
    assert [len(one["disagreement"]) for one in found] == [3, 3]
    assert min(found[1]["disagreement"]) > 0.05
    assert max(found[0]["disagreement"]) < max(found[1]["disagreement"]) < 0.7


def test_disagreement_along_training(models: dict[str, str], undecided: str, snippets: str, tmp_path: Path) -> None:
    for folder in models.values():
        lines = [json.loads(line) for line in (Path(folder) / FILE).read_text().splitlines()]
        assert [line["step"] for line in lines] == [2, 6]
    flags = ["train", "--task", snippets, "--model", undecided, "--method", "vanilla", "--max_steps", "2"]
    flags += ["--learning_rate", "1e-9", "--max_length", "32", "--max_eval_samples", "32", "--report_to", "none"]
    flags += ["--disable_tqdm", "true", "--save_strategy", "no", "--output_dir", str(tmp_path / "a")]
    main([*flags, "--disagreement_steps", "1"])
    (line,) = map(json.loads, (tmp_path / "a" / FILE).read_text().splitlines())
    assert 0.05 < line["disagreement"] < 0.7
    main([*flags[:-1], str(tmp_path / "b")])  # measuring draws no random number of training's
    weights = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.usefixtures("cold")
def test_disagreement_is_logged_and_measured_over_ranks(
    two_layers: str, snippets: str, tmp_path: Path, extensions: Path
) -> None:
    flags = ["train", "--task", snippets, "--model", two_layers, "--method", "rose-first", "--max_steps", "3"]
    flags += ["--per_device_train_batch_size", "4", "--max_length", "32", "--max_eval_samples", "31"]
    flags += ["--disable_tqdm", "true", "--report_to", "none", "--save_steps", "3", "--logging_steps", "1"]
    flags += ["--disagreement_steps", "2", "--output_dir", str(tmp_path)]
    command = [*deepspeed(2), "launch/train.py", "--deepspeed", "ds_configs/zero3.json", *flags[1:]]
    job = run(command, TORCH_EXTENSIONS_DIR=str(extensions))
    assert job.returncode == 0
    (line,) = map(json.loads, (tmp_path / FILE).read_text().splitlines())
    assert (31 * line["disagreement"]) == pytest.approx(round(31 * line["disagreement"]))  # rows are counted once
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    logged = [entry["rose/disagreement"] for entry in state["log_history"] if "loss" in entry]
    assert len(logged) == 3
    assert all((8 * value).is_integer() and 0 <= value <= 1 for value in logged)  # of 4 rows on each of 2 ranks


def test_inspect(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "masks.html"
    main(["inspect", models["rose-first"], models["rose-first"], "--output", str(path)])
    text = path.read_text(encoding="utf-8")
    assert text.count("attention.self.query") >= 2  # a row of a heat map of each
    assert not re.search(r"<(script|link)[^>]+(src|href)=", text)  # needs no network
    with pytest.raises(SystemExit):
        main(["inspect", models["vanilla"]])
    assert "has no masks.jsonl: a method without masks" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_a_browser_draws_every_figure(models: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "masks.html"
    main(["inspect", models["rose-first"], "--output", str(path)])
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom"]
    dom = run([*browser, path.as_uri()], timeout=120).stdout
    assert dom.count('class="main-svg"') >= 5  # heat maps, risks, thresholds, stability


def test_probe(minilm: str, snippets: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two layers would learn nothing of 32 items."""
    flags = ["--seeds", "0", "1", "--train_items", "32", "--test_items", "16", "--epochs", "1"]
    command = [
        "probe",
        trained(minilm, "vanilla", tmp_path, "--max_steps", "2"),
        *flags,
        "--surface",
        "lexical",
        "--output_dir",
        str(tmp_path),
    ]
    main(command)
    runs = result(tmp_path, "probing")["runs"]
    assert [(r["model"], r["surface"], r["seed"]) for r in runs] == [("vanilla", "lexical", s) for s in (0, 1)]
    assert all(-1 <= r["mcc"] <= 1 and 0 <= r["train_accuracy"] <= 1 for r in runs)
    assert runs[0]["train_accuracy"] != runs[1]["train_accuracy"] or runs[0]["mcc"] != runs[1]["mcc"]
    assert "| vanilla | lexical |" in capsys.readouterr().out
    assert (tmp_path / "probing.png").stat().st_size > 5_000
    main(command)  # again: nothing is trained anew
    assert result(tmp_path, "probing")["runs"] == runs
