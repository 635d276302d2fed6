"""What a run does on a file system that is full, read-only, taken away, or used by another job."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from launching import ROOT
from safetensors.torch import load_file
from spawn import run_ranks
from transformers import TrainerCallback

from rose_ds import RefusedConfiguration
from rose_ds.cli import main
from rose_ds.experiments import train as experiment
from rose_ds.experiments.models import load_tokenizer
from rose_ds.experiments.saving import PARTIAL
from rose_ds.training import checkpoints, records, sole_use
from rose_ds.training.mask_record import read_masks
from rose_ds.training.trainer import RoseTrainer

MIB = 2**20


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of ``size`` bytes of its own, which ``resize`` changes."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here (it needs root): {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def size_of(folder: Path) -> int:
    """In whole pages, as tmpfs counts."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def tiny(minilm: str, snippets: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a run of six steps with a small model, without --output_dir."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tokenizer = load_tokenizer(minilm)
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"intermediate_size": 32, "max_position_embeddings": 64},
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    flags = ["--task", snippets, "--model", str(folder), "--max_train_samples", "48", "--max_eval_samples", "8"]
    flags += ["--max_length", "32", "--per_device_train_batch_size", "8", "--max_steps", "6", "--save_steps", "2"]
    return [
        *flags,
        "--learning_rate",
        "1e-3",
        "--lr_scheduler_type",
        "constant",
        "--disable_tqdm",
        "true",
        "--report_to",
        "none",
        "--logging_steps",
        "1",
    ]


@pytest.fixture(scope="module")
def whole(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without a fault."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    main(["train", *tiny, "--output_dir", str(folder)])
    assert not (folder / sole_use.FILE).exists() and not (folder / PARTIAL).exists()
    return folder


def assert_same(one: Path, other: Path) -> None:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    names = {path.relative_to(one).as_posix() for path in one.rglob("*") if path.is_file()}
    assert names == {path.relative_to(other).as_posix() for path in other.rglob("*") if path.is_file()}


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, do: Callable[[], None]) -> None:
    """Something that happens outside, after this step of the run to come and before its checkpoint."""

    class Outside(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                do()

    class Trainer(RoseTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(Outside())

    monkeypatch.setattr(experiment, "RoseTrainer", Trainer)


# --- full ---


def test_full_while_a_checkpoint_is_written(whole: Path, tiny: list[str], tmp_path: Path) -> None:
    """Room for a checkpoint and a half; with more room the run goes on as if nothing had been."""
    with small_disk(tmp_path / "disk", int(1.5 * size_of(whole / "checkpoint-2"))) as disk:
        out = disk / "run"
        flags = ["train", *tiny, "--output_dir", str(out)]
        with pytest.raises(checkpoints.CheckpointError) as stop:
            main(flags)
        words = str(stop.value)
        assert words.startswith(
            f"{out / 'checkpoint-4'} could not be written; {out / 'checkpoint-2'} is the newest whole one, and what "
            "was trained after it is lost. Is the disk full ("
        )
        assert "Remove the cause, then resume (--resume auto)." in words
        assert checkpoints.newest(out)[0] == out / "checkpoint-2"
        remount(disk, f"size={8 * size_of(whole)}")
        main([*flags, "--resume", "auto"])
        assert_same(whole, out)


def test_full_while_the_model_is_written(whole: Path, tiny: list[str], tmp_path: Path) -> None:
    """The last checkpoint fits and the model does not: an exit code, and nothing that looks like a finished run."""
    room = size_of(whole / "checkpoint-6") + (whole / "model.safetensors").stat().st_size // 2
    with small_disk(tmp_path / "disk", room) as disk:
        out = disk / "run"
        flags = ["train", *tiny, "--save_steps", "6", "--output_dir", str(out)]
        done = subprocess.run(
            [sys.executable, "-m", "rose_ds", *flags], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 1, done.stderr[-3000:]
        assert f"the trained model in {out} could not be written; {out / 'checkpoint-6'} is the newest whole one" in (
            done.stderr
        )
        assert [path.name for path in out.iterdir() if path.name != "masks.jsonl"] == ["checkpoint-6"]
        remount(disk, f"size={8 * size_of(whole)}")
        main([*flags, "--resume", "auto"])
        a, b = (load_file(folder / "model.safetensors") for folder in (whole, out))
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert json.loads((out / "metrics.json").read_text())["steps"] == 6


def test_a_model_that_cannot_be_written_leaves_the_one_before(
    whole: Path, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained on for two steps in the folder of a finished run: model and metrics.json stay those of one run."""
    with small_disk(tmp_path / "disk", 8 * size_of(whole)) as disk:
        out = disk / "run"
        shutil.copytree(whole, out)
        before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
        after_step(monkeypatch, 8, lambda: remount(disk, f"size={size_of(disk) + 8192}"))
        flags = ["train", *tiny, "--max_steps", "8", "--save_steps", "50", "--resume", "auto", "--output_dir", str(out)]
        monkeypatch.setattr(RoseTrainer, "_save_checkpoint", lambda *_: None)
        with pytest.raises(
            checkpoints.CheckpointError, match="the trained model in .*checkpoint-6 is the newest whole"
        ):
            main(flags)
        after = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
        for name in ("model.safetensors", "metrics.json", "config.json", "README.md", "predictions.jsonl"):
            assert after[name] == before[name], name


def test_full_while_records_are_written(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Logs and mask records of three steps are lost, said once each; the run ends as it would have."""
    with small_disk(tmp_path / "disk", 16 * MIB) as disk:
        out = disk / "run"
        filler = disk / "filler"

        def fill() -> None:
            with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            with (out / "masks.jsonl").open("ab") as file:  # what is left of its last page
                file.truncate(file.tell())

        after_step(monkeypatch, 2, fill)
        monkeypatch.setattr(RoseTrainer, "_finalize_training", freeing(filler, RoseTrainer._finalize_training))
        flags = ["--report_to", "tensorboard", "--save_strategy", "no", "--record_masks", "1"]
        with caplog.at_level(logging.WARNING):
            main(["train", *tiny, *flags, "--output_dir", str(out)])
        said = [r.getMessage() for r in caplog.records if r.name == records.__name__]
        assert len(said) == 2, said
        assert all("No space left on device" in words and "training goes on" in words for words in said)
        assert any(str(out / "masks.jsonl") in words for words in said)
        assert json.loads((out / "metrics.json").read_text())["steps"] == 6
        steps = [line["step"] for line in read_masks(out / "masks.jsonl")[1]]
        assert steps[:2] == [1, 2] and len(steps) < 6, steps


def freeing(filler: Path, method: Any) -> Any:
    def freed(*args: Any, **kwargs: Any) -> Any:
        filler.unlink()
        return method(*args, **kwargs)

    return freed


# --- read-only, and taken away ---


def test_read_only_is_refused_before_training(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", MIB) as disk:
        (disk / "run").mkdir()
        remount(disk, "ro")
        for out in (disk / "run", disk / "new"):
            with pytest.raises(SystemExit) as stop:
                main(["train", *tiny, "--output_dir", str(out)])
            assert stop.value.code == 2
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert error.startswith(f"rose-ds train: error: --output_dir {out} cannot be written to (")
            assert "read-only file system" in error.lower() and error.endswith("or choose another --output_dir")


def test_full_before_training_is_refused(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk", MIB) as disk:
        (disk / "filler").write_bytes(bytes(MIB))
        with pytest.raises(SystemExit):
            main(["train", *tiny, "--output_dir", str(disk)])
        assert "cannot be written to (No space left on device)" in capsys.readouterr().err


def test_what_is_removed_under_a_running_job_is_written_again(
    whole: Path, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint at step 3, the whole folder at step 5: the next checkpoint is whole, and the result the same."""
    out = tmp_path / "run"
    after_step(monkeypatch, 3, lambda: shutil.rmtree(out / "checkpoint-2"))
    flags = ["train", *tiny, "--report_to", "tensorboard", "--output_dir", str(out)]
    main([*flags, "--max_steps", "4"])
    assert checkpoints.newest(out) == (out / "checkpoint-4", [])
    after_step(monkeypatch, 5, lambda: shutil.rmtree(out))
    main([*flags, "--resume", "auto"])
    assert checkpoints.newest(out) == (out / "checkpoint-6", [])
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, out))
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- used by another job ---

_HOLD = """
import os, sys, time
from pathlib import Path
from rose_ds.training.sole_use import sole_use_of
with sole_use_of(Path(sys.argv[1])):
    child = os.fork()  # as a data loader's worker, which outlives its parent
    if child:
        print(child, flush=True)
    time.sleep(100)
"""


@contextmanager
def another_job(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that uses the folder, and its child."""
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        yield holder, child
    finally:
        os.kill(child, signal.SIGKILL)
        holder.kill()
        holder.wait()
        holder.stdout.close()


def told_of(rank: int, world: int, folder: str) -> str:
    """What a rank is told."""
    sole_use.PATIENCE = 0.5
    try:
        with sole_use.sole_use_of(Path(folder)):
            return "in use here"
    except RefusedConfiguration as error:
        return str(error)


def test_a_second_job_is_refused_and_a_requeued_one_is_not(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(sole_use, "PATIENCE", 0.5)
    with another_job(out) as (holder, child):
        with pytest.raises(SystemExit) as stop:
            main(["train", *tiny, "--output_dir", str(out)])
        assert stop.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"rose-ds train: error: --output_dir {out} is in use by process {holder.pid} on ")
        assert error.endswith("wait for that job's end or stop it, or choose another --output_dir")
        one, other = run_ranks(told_of, 2, str(out))
        assert one == other and f"{out} is in use by process {holder.pid}" in one
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # is still there
        assert (out / sole_use.FILE).is_file()
        monkeypatch.setattr(sole_use, "PATIENCE", 0.0)
        main(["train", *tiny, "--output_dir", str(out)])
    assert (out / "metrics.json").is_file() and not (out / sole_use.FILE).exists()


def test_a_refused_job_leaves_no_folder(tiny: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["train", *tiny, "--max_length", "4000", "--output_dir", str(tmp_path / "a" / "b")])
    assert not (tmp_path / "a").exists()


def test_without_locks_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(sole_use.fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING), sole_use.sole_use_of(tmp_path):
        pass
    assert f"the file system of {tmp_path} has no locks" in caplog.text
