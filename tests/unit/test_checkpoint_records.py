"""Which folders count as whole checkpoints, and which settings may differ."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rose_ds import RefusedConfiguration
from rose_ds.training import checkpoints
from rose_ds.training.checkpoints import Record

pytestmark = pytest.mark.fast


def record(step: int, files: dict[str, int], **more: Any) -> Record:
    return Record(step, step, world_size=2, engine="fsdp2", files=files, fixed={"seed": 1}, free={}, **more)


def make(output_dir: Path, step: int) -> Path:
    """A checkpoint of two files, whole."""
    folder = output_dir / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "model.bin").write_bytes(b"12345")
    (folder / "shards" / "rank1.bin").write_bytes(b"")
    record(step, checkpoints.files_in(folder)).write(folder)
    return folder


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = make(tmp_path, 10)
    assert checkpoints.read(folder) == record(10, {"model.bin": 5, "shards/rank1.bin": 0})
    assert sorted(path.name for path in folder.iterdir()) == ["model.bin", checkpoints.FILE, "shards"]
    (folder / f".{checkpoints.FILE}.77").write_text("half a rec")  # of a process killed while it wrote it
    assert checkpoints.files_in(folder) == {"model.bin": 5, "shards/rank1.bin": 0}
    assert checkpoints.newest(tmp_path) == (folder, [])


def test_the_newest_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        make(tmp_path, step)
    (tmp_path / "checkpoint-200").write_text("a file")
    (tmp_path / "checkpoint-300-tmp").mkdir()
    (tmp_path / "tmp-checkpoint-300").mkdir()
    assert checkpoints.newest(tmp_path) == (tmp_path / "checkpoint-100", [])
    assert checkpoints.newest(tmp_path / "nowhere") == (None, [])


DAMAGE = {
    "no record": (lambda f: (f / checkpoints.FILE).unlink(), f"{checkpoints.FILE} is missing"),
    "half a record": (lambda f: (f / checkpoints.FILE).write_text('{"step": 3, '), "is not a checkpoint's record"),
    "another record": (lambda f: (f / checkpoints.FILE).write_text("[1]"), "is not a checkpoint's record"),
    "missing file": (lambda f: (f / "shards" / "rank1.bin").unlink(), "rank1.bin is missing"),
    "truncated file": (lambda f: (f / "model.bin").write_bytes(b"123"), "model.bin has 3 bytes, 5 were written"),
    "longer file": (lambda f: (f / "shards" / "rank1.bin").write_bytes(b"1"), "rank1.bin has 1 bytes, 0 were"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_passed_over_and_refused(damage: str, tmp_path: Path) -> None:
    whole, torn = make(tmp_path, 3), make(tmp_path, 6)
    harm, message = DAMAGE[damage]
    harm(torn)
    found, reasons = checkpoints.newest(tmp_path)
    assert found == whole
    assert len(reasons) == 1
    assert message in reasons[0]
    assert str(torn) in reasons[0]
    with pytest.raises(RefusedConfiguration, match=message):
        checkpoints.read(torn)


def test_a_full_disk_names_the_folder_and_what_is_left(tmp_path: Path) -> None:
    folder, whole = tmp_path / "checkpoint-6", make(tmp_path, 3)
    text = str(checkpoints.not_written(folder, folder.parent, OSError(28, "No space left on device")))
    assert text.startswith(f"{folder} could not be written; {whole} is the newest whole one")
    assert "[Errno 28] No space left on device" in text


def test_settings_are_compared_as_they_are_read_back() -> None:
    now = {"seed": 1, "include": ("a", "b"), "learning_rate": 1e-5}
    assert checkpoints.changed({"seed": 1, "include": ["a", "b"], "learning_rate": 1e-5}, now) == []
    before = {"seed": 2, "include": ["a"], "gone": 4}
    assert checkpoints.changed(before, now) == [
        "seed 2 -> 1",
        "include ['a'] -> ['a', 'b']",
        "gone 4 -> None",
        "learning_rate None -> 1e-05",
    ]


@pytest.mark.parametrize(("before", "now"), [("plain", "ddp"), ("zero2", "zero3"), ("fsdp2", "fsdp2")])
def test_engines_that_read_each_other(before: str, now: str) -> None:
    saved = dataclasses.replace(record(1, {}), engine=before)
    changes = checkpoints.check_settings(Path("c"), saved, now, {"seed": 1}, {})
    assert changes == ([] if before == now else [f"engine {before} -> {now}"])


@pytest.mark.parametrize(
    ("before", "now"), [("ddp", "fsdp2"), ("fsdp1", "fsdp2"), ("zero0", "zero2"), ("zero2", "ddp")]
)
def test_engines_that_do_not_are_refused(before: str, now: str) -> None:
    saved = dataclasses.replace(record(1, {}), engine=before)
    with pytest.raises(RefusedConfiguration, match=f"written on engine {before}, and {now} cannot read"):
        checkpoints.check_settings(Path("c"), saved, now, {"seed": 1}, {})
