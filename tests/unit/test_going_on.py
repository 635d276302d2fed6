"""How a job that starts again finds its folder and its checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rose_ds import RefusedConfiguration
from rose_ds.experiments.train import _checkpoint
from rose_ds.training import checkpoints, sole_use

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("resume", "given", "own", "wanted"),
    [
        (None, None, "own", None),
        (None, "given", "own", "given"),
        ("auto", None, None, None),
        ("auto", None, "own", "own"),
        ("auto", "given", None, "given"),
        pytest.param("auto", "given", "own", "own", id="a job that is put back into a queue names its start again"),
    ],
)
def test_which_checkpoint(resume: str | None, given: str | None, own: str | None, wanted: str | None) -> None:
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(resume_from_checkpoint=given), newest_checkpoint=lambda: own and Path(own)
    )
    method: Any = SimpleNamespace(resume=resume)
    assert _checkpoint(method, trainer) == (wanted and Path(wanted))


def test_the_other_ranks_hear_that_the_first_one_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More often than a process group's timeout, however long the lock takes."""
    monkeypatch.setattr(sole_use, "_TURN", 0.3)
    heard: list[Any] = []
    other = sole_use._try(tmp_path / sole_use.FILE)
    assert other is not None

    def gather(value: Any) -> list[Any]:
        heard.append(value)
        if len(heard) == 3:
            other.release()
        return [value, (None, False)]

    monkeypatch.setattr(checkpoints, "gather", gather)
    with sole_use.sole_use_of(tmp_path):
        assert (tmp_path / sole_use.FILE).is_file()
    assert len(heard) > 3 and heard[:-1] == [(None, True)] * (len(heard) - 1) and heard[-1] == (None, False)


def test_patience_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sole_use, "_TURN", 0.2)
    monkeypatch.setattr(sole_use, "PATIENCE", 0.5)
    other = sole_use._try(tmp_path / sole_use.FILE)
    assert other is not None
    with pytest.raises(RefusedConfiguration, match="is in use by another job"), sole_use.sole_use_of(tmp_path):
        pass
    other.release()
