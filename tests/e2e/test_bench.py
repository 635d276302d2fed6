"""rose-ds bench on the packaged model and real sentences."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rose_ds.cli import main
from rose_ds.experiments.cost.turns import measure

FAST = "rose-ensemble, fast"


def test_bench(two_layers: str, snippets: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Passes are counted while they run, in two micro-batches; time and memory are compared with AdamW's."""
    output, picture = tmp_path / "cost.json", tmp_path / "cost.png"
    told = ["--methods", FAST, "smart", "--batch_size", "8", "--rounds", "2", "--warmup", "1", "--threads", "1"]
    told += ["--gradient_accumulation_steps", "2"]
    main(["bench", "--task", snippets, "--model", two_layers, *told, "--output", str(output), "--plot", str(picture)])
    found = json.loads(output.read_text())
    assert found["command"].startswith("rose-ds bench --task snippets")
    assert 15e6 < found["parameters"] < 16e6
    methods = found["methods"]
    assert list(methods) == ["vanilla", FAST, "smart"]
    assert [methods[name]["passes"] for name in methods] == [
        {"forward": 1, "backward": 1, "probe": 0},
        {"forward": 1.25, "backward": 1.25, "probe": 0},
        {"forward": 3, "backward": 3, "probe": 1},
    ]
    assert [round(methods[name]["arithmetic"], 2) for name in methods] == [1, 1.25, 2.67]
    assert methods["vanilla"]["ratio"] == methods["vanilla"]["peak_ratio"] == 1
    for one in methods.values():
        low, high = one["ratio_quartiles"]
        assert 0 < low <= one["ratio"] <= high
        assert one["peak_bytes"] > 3 * 4 * found["parameters"], "gradient and moments are in it"
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == list(methods)


@pytest.mark.parametrize("told", [["zero2"], ["fsdp2", "--bf16"]], ids=" ".join)
def test_on_ranks(told: list[str], two_layers: str, snippets: str, tmp_path: Path) -> None:
    """Two processes each, and a risk that takes no pass of its own."""
    output, method = tmp_path / "cost.json", "rose-ensemble, halves"
    told = ["--engine", *told, "--ranks", "2", "--gradient_accumulation_steps", "2", "--methods", method]
    more = ["--batch_size", "8", "--rounds", "2", "--warmup", "1", "--threads", "1", "--output", str(output)]
    main(["bench", "--task", snippets, "--model", two_layers, *told, *more])
    found = json.loads(output.read_text())
    assert 15e6 < found["parameters"] < 16e6
    for one in found["methods"].values():
        assert one["passes"] == {"forward": 1, "backward": 1, "probe": 0}
        assert one["ratio"] > 0 and one["peak_bytes"] > 8 * found["parameters"] / 2, "a rank's half of the states"


def test_a_method_that_ends_is_named(snippets: str) -> None:
    job = {
        **{"run": {"task": snippets, "model": "/no/such/model"}, "engine": "plain", "ranks": 1, "bf16": False},
        **{"batch_size": 4, "accumulation": 1, "threads": 1},
    }
    with pytest.raises(RuntimeError, match="vanilla: its process ended with 1"):
        measure(["rose-second"], job, rounds=2, warmup=0)


@pytest.mark.fast
def test_a_method_that_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As Linux does where memory runs out."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    job = {"engine": "plain", "ranks": 1, "threads": 1}
    with pytest.raises(RuntimeError, match=r"vanilla: its process was killed.* measure fewer --methods in a run"):
        measure(["rose-second"], job, rounds=2, warmup=0)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("told", "message"),
    [
        (["--rounds", "1"], "rounds=1 must be at least 2"),
        (["--methods", "rose-third"], "rose-third"),
        (["--methods", "r-drop, fast"], "only methods that rank by first-order risk have a fast mode"),
        (["--methods", "rose-first, halves"], "'rose-first, halves' compares micro-batches: add --gradient_acc"),
        (
            ["--batch_size", "9", "--gradient_accumulation_steps", "2"],
            "batch_size=9 is not a multiple of 2 micro-batch",
        ),
        (["--engine", "fsdp1"], "engine='fsdp1' cannot be measured"),
        (["--engine", "plain", "--ranks", "2"], "engine='plain' is one process"),
        (["--output", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
    ],
)
def test_bad_input(told: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *told])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_batch_of_more_rows_than_there_are(snippets: str, capsys: pytest.CaptureFixture[str]) -> None:
    test_bad_input(["--batch_size", "1000000"], "batch_size=1000000: the training set has", capsys)
