"""``rose-ds train --resume auto``: the same run goes on or is refused in one line; torn checkpoints are passed over."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, RepoUrl
from launching import ROOT
from safetensors.torch import load_file

from rose_ds.cli import main
from rose_ds.experiments.evaluation import read_trajectory
from rose_ds.experiments.metrics import Metrics
from rose_ds.training import checkpoints

FLAGS = ["--task", "snippets", "--max_train_samples", "40", "--max_eval_samples", "8", "--max_length", "32"]
FLAGS += ["--per_device_train_batch_size", "8", "--learning_rate", "1e-4", "--seed", "3", "--save_steps", "3"]
FLAGS += ["--logging_steps", "2", "--disable_tqdm", "true", "--report_to", "none"]
EPOCH = 5  # steps


@pytest.fixture(scope="module")
def whole(minilm: str, snippets: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Seven steps without interruption: checkpoints 3, 6 and 7."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    main(["train", *FLAGS, "--max_steps", "7", "--output_dir", str(folder)])
    yield folder
    shutil.rmtree(folder)


def process(out: Path, faults: dict[str, Any], *flags: str) -> tuple[int, str, float]:
    """rose-ds in a process of its own, with SIGTERM in the step it pauses in; the seconds are those from then on."""
    env = {**os.environ, "FAULTS": json.dumps({**faults, "out": str(out.parent)})}
    command = [sys.executable, "tests/e2e/scripts/faulty.py", "train", *FLAGS, "--output_dir", str(out), *flags]
    log = out.parent / "log"
    with log.open("w") as file:
        started = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)
    try:
        start = time.time()
        if "pause" in faults:
            while not (out.parent / "pausing-0").exists():
                assert started.poll() is None and time.time() < start + 100, log.read_text()[-4000:]
                time.sleep(0.05)
            start = time.time()
            started.send_signal(signal.SIGTERM)
            started.send_signal(signal.SIGTERM)  # launchers repeat what a scheduler has sent
            (out.parent / "go").touch()
        code = started.wait(timeout=100)
    finally:
        started.kill()
    return code, log.read_text(), time.time() - start


def history(folder: Path) -> list[dict[str, Any]]:
    newest, _ = checkpoints.newest(folder)
    assert newest is not None
    entries: list[dict[str, Any]] = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return entries


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_terminated_within_an_epoch_and_resumed(whole: Path, tmp_path: Path) -> None:
    """SIGTERM in step 4 of 5: the checkpoint lies between two of save_steps and two of logging_steps."""
    out = tmp_path / "run"
    code, log, seconds = process(out, {"pause": 2}, "--max_steps", "7")
    print(f"plain terminated: exit code {code} after {seconds:.1f} s")
    assert code == 128 + signal.SIGTERM
    assert "SIGTERM received: checkpoint saved at step 3, resume with --resume auto" in log
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-3", "masks.jsonl"]  # no model, no metrics.json
    code, log, _ = process(out, {}, "--max_steps", "7", "--resume", "auto")
    assert code == 0, log[-4000:]
    assert f"resuming from {out / 'checkpoint-3'}" in log
    trained_on = json.loads((out.parent / "rows-0.json").read_text())
    assert sorted(map(int, trained_on)) == [3, 4, 5, 6]  # a run that began anew would end alike
    assert same_weights(out, whole)
    assert history(out) == history(whole)
    assert [entry["step"] for entry in history(out)] == [2, 4, 6]
    assert all(
        {"loss", "rose/tau_first", "rose/tau_second", "rose/disagreement"} <= entry.keys() for entry in history(out)
    )
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, out)]
    assert metrics[0]["kept_fraction"] == pytest.approx(metrics[1]["kept_fraction"], abs=1e-12)


def test_terminated_in_a_step_of_an_evaluation(two_layers: str, tmp_path: Path) -> None:
    """It is left out, since SIGKILL may follow soon, and made up for when the run goes on; also after the last step."""
    flags = ["--model", two_layers, "--max_steps", "4", "--eval_strategy", "steps", "--eval_steps", "2"]
    flags += ["--save_steps", "2", "--load_best_model_at_end", "true"]
    flags += ["--metric_for_best_model", "ece", "--greater_is_better", "true"]
    undisturbed = tmp_path / "whole"
    main(["train", *FLAGS, *flags, "--output_dir", str(undisturbed)])
    expected = read_trajectory(undisturbed)
    assert [line["step"] for line in expected] == [2, 4]
    for pause in (3, 1):  # the step after so many
        out = tmp_path / str(pause) / "run"
        out.parent.mkdir()
        code, log, _ = process(out, {"pause": pause}, *flags)
        assert code == 128 + signal.SIGTERM, log[-4000:]
        assert [line["step"] for line in read_trajectory(out)] == [2][: pause // 2]
        code, log, _ = process(out, {}, *flags, "--resume", "auto")
        assert code == 0, log[-4000:]
        assert read_trajectory(out) == expected and same_weights(out, undisturbed)
        # the best step's, 2 or 4: one of the two would not be known without its evaluation
        metrics = Metrics.read(out)
        assert metrics.step_seconds and metrics.peak_memory_bytes


def copy(whole: Path, tmp_path: Path, *names: str) -> Path:
    for name in names:
        shutil.copytree(whole / name, tmp_path / "run" / name)
    return tmp_path / "run"


def test_a_finished_run_takes_no_further_step(whole: Path, tmp_path: Path) -> None:
    """Stopped in its last evaluation, say: the model and metrics.json are written, and are the same."""
    out = copy(whole, tmp_path, "checkpoint-7")
    assert 7 % EPOCH, "the end is within an epoch"
    main(["train", *FLAGS, "--max_steps", "7", "--resume", "auto", "--output_dir", str(out)])
    assert same_weights(out, whole)
    assert json.loads((out / "metrics.json").read_text())["steps"] == 7


def test_a_finished_run_again_and_the_hub(
    two_layers: str, snippets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of whole epochs, given again, measures what it had measured; what is pushed is the whole folder."""
    out, pushed = tmp_path / "run", list[set[str]]()

    def upload(self: HfApi, *, folder_path: Path, **_: Any) -> None:
        pushed.append({path.name for path in Path(folder_path).iterdir()})

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **_: RepoUrl(f"https://huggingface.co/{repo}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    flags = ["train", *FLAGS, "--model", two_layers, "--num_train_epochs", "1", "--output_dir", str(out)]
    flags += ["--push_to_hub", "true", "--hub_model_id", "me/mine", "--hub_token", "hf_x", "--hub_strategy", "end"]
    main(flags)
    assert {"README.md", "metrics.json", "model.safetensors", "predictions.jsonl"} <= pushed[0] and len(pushed) == 1
    assert "hf_x" not in (out / "README.md").read_text()
    first = Metrics.read(out)
    first.under_attack = {"pruthi, 8 items a": 0.5}
    first.write(out)

    def offline(self: HfApi, **_: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(HfApi, "upload_folder", offline)
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--resume", "auto"])
    assert stop.value.code == 2
    assert f"hf upload me/mine {out}" in capsys.readouterr().err
    again = Metrics.read(out)
    assert (again.steps, again.skipped_steps, again.under_attack) == (EPOCH, 0, first.under_attack)
    assert again.kept_fraction == pytest.approx(first.kept_fraction)
    assert (again.train_seconds or 0) > 0.5 * (first.train_seconds or 1)


def test_an_earlier_checkpoint_beside_later_ones(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which --resume auto would take the next time: a run that was given up would go on."""
    out = copy(whole, tmp_path, "checkpoint-3", "checkpoint-6", "checkpoint-7")
    with pytest.raises(SystemExit) as stop:
        main(["train", *FLAGS, "--output_dir", str(out), "--resume_from_checkpoint", str(out / "checkpoint-3")])
    assert stop.value.code == 2
    assert "later checkpoints than checkpoint-3 (checkpoint-6, checkpoint-7)" in capsys.readouterr().err


def test_a_torn_checkpoint_is_passed_over(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy(whole, tmp_path, "checkpoint-3", "checkpoint-6", "checkpoint-7")
    (out / "checkpoint-7" / checkpoints.FILE).unlink()
    torn = out / "checkpoint-6" / "optimizer.pt"
    size = torn.stat().st_size
    os.truncate(torn, size - 1)
    (out / "tmp-checkpoint-9").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["train", *FLAGS, "--output_dir", str(out), "--resume_from_checkpoint", str(torn.parent)])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"rose-ds train: error: {torn} has {size - 1} bytes, {size} were written"
    with caplog.at_level(logging.INFO):
        main(["train", *FLAGS, "--max_steps", "6", "--output_dir", str(out), "--resume", "auto"])
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("rose_ds")]
    assert f"resuming from {out / 'checkpoint-3'}" in messages
    assert f"checkpoint passed over: {torn} has {size - 1} bytes, {size} were written" in messages
    assert any(f"{out / 'checkpoint-7' / checkpoints.FILE} is missing" in message for message in messages)
    assert "resuming with another setting: max_steps 7 -> 6" in messages
    assert torn.stat().st_size == size  # written again, whole
    assert checkpoints.newest(out)[0] == out / "checkpoint-6"


def test_the_old_checkpoint_stays_until_the_new_one_is_whole(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copy(whole, tmp_path, "checkpoint-7")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.Record, "write", full)
    flags = ["--max_steps", "8", "--save_total_limit", "1", "--resume", "auto", "--output_dir", str(out)]
    with pytest.raises(checkpoints.CheckpointError, match="checkpoint-8 could not be written.*No space left on device"):
        main(["train", *FLAGS, *flags])
    assert checkpoints.newest(out)[0] == out / "checkpoint-7"
    monkeypatch.undo()
    main(["train", *FLAGS, *flags])
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-8"]


def test_other_settings_are_refused_by_name(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = {
        "model": ("minilm", "run"),  # the trained model's folder
        "max_length": (32, 24),
        "max_train_samples": (40, 48),
        "keep_first": (0.6, 0.5),
        "seed": (3, 4),
        "learning_rate": (0.0001, 0.0002),
        "max_grad_norm": (1.0, 0.5),
    }
    flags = [text for name, (_, new) in changed.items() if name != "model" for text in (f"--{name}", str(new))]
    flags += ["--model", str(whole), "--gradient_accumulation_steps", "2", "--max_steps", "9"]
    before = {path: path.stat().st_mtime for path in whole.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        main(["train", *FLAGS, *flags, "--output_dir", str(whole), "--resume", "auto"])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"rose-ds train: error: {whole / 'checkpoint-7'} was trained with other settings: ")
    assert error.endswith("Give the old values to go on with that run, or another --output_dir to start a new one")
    for name, (old, new) in {**changed, "global batch": (8, 16), "rows": (40, 48)}.items():
        assert f"{name} {old} -> {new}" in error
    assert before == {path: path.stat().st_mtime for path in whole.rglob("*")}


def test_what_may_change_is_logged_and_used(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """More steps, another split of the global batch, other steps to save and log at."""
    out = copy(whole, tmp_path, "checkpoint-7")
    flags = ["--max_steps", "9", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    flags += ["--save_steps", "8", "--logging_steps", "1", "--resume", "auto", "--output_dir", str(out)]
    with caplog.at_level(logging.INFO):
        main(["train", *FLAGS, *flags])
    for change in (
        "per_device_train_batch_size 8 -> 4",
        "gradient_accumulation_steps 1 -> 2",
        "max_steps 7 -> 9",
        "save_steps 3 -> 8",
        "logging_steps 2 -> 1",
    ):
        assert f"resuming with another setting: {change}" in caplog.text
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-7", "checkpoint-8", "checkpoint-9"]
    assert [entry["step"] for entry in history(out)] == [2, 4, 6, 8, 9]
