"""What stands beside a trained model: the command that made it, and the way there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rose_ds.experiments.card import card
from rose_ds.experiments.evaluation import TRAJECTORY, TrajectoryCallback, read_trajectory, write_lines
from rose_ds.experiments.metrics import Metrics
from rose_ds.training.callbacks import StepMeter

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["train", "--task", "rte"], "rose-ds train --task rte"),
        (["--task", "rte"], "rose-ds train --task rte"),  # launch/train.py
        (["--local_rank=0", "train", "--task", "rte"], "rose-ds train --task rte"),  # deepspeed --module
        (["--local_rank=3", "--task", "rte"], "rose-ds train --task rte"),
        (["--task", "rte", "--local-rank", "3", "--bf16"], "rose-ds train --task rte --bf16"),
        (["train", "--hub_token", "hf_x", "--task=rte"], "rose-ds train --hub_token ... --task=rte"),
        (["train", "--hub-token=hf_x"], "rose-ds train --hub-token=..."),
        (["train", "--hub-token", "hf_x"], "rose-ds train --hub-token ..."),
        (["train", "--hub_token", "hf_x==", "--bf16"], "rose-ds train --hub_token ... --bf16"),
    ],
)
def test_the_command_on_a_card(words: list[str], shown: str) -> None:
    text = card(Metrics(task="rte", model="m"), ["a", "b"], ["rose-ds", *words])
    assert f"```bash\n{shown}\n```" in text and "hf_x" not in text


def test_the_ranks_on_a_card() -> None:
    text = card(Metrics(task="rte", model="m", world_size=4), ["a", "b"], ["launch/train.py", "--task", "rte"])
    assert "```bash\n# on each of 4 ranks, by a launcher\nrose-ds train --task rte\n```" in text


@pytest.mark.parametrize(("step", "kept"), [(0, []), (100, [0, 100]), (250, [0, 100, 200])])
def test_a_trajectory_begins_where_its_run_does(step: int, kept: list[int], tmp_path: Path) -> None:
    """A fresh run has no line of the folder's last one; a resumed one those up to its checkpoint."""
    write_lines(tmp_path / TRAJECTORY, [{"step": n, "clean": 0.5} for n in (0, 100, 200, 300)])
    unused: Any = None
    callback = TrajectoryCallback(unused, unused, tmp_path)
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=step)
    callback.on_train_begin(unused, state, unused)
    assert [line["step"] for line in read_trajectory(tmp_path)] == kept


def test_a_damaged_line_of_a_trajectory_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / TRAJECTORY
    path.write_text('{"step": 1, "clean": 0.5}\n\x00\x00{"step"\n{"step": 2, "clean": 0.6}\n')
    with pytest.raises(ValueError, match=rf"{TRAJECTORY}:2: not a line"):
        read_trajectory(tmp_path)
    unused: Any = None
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=2)
    TrajectoryCallback(unused, unused, tmp_path).on_train_begin(
        SimpleNamespace(eval_strategy="no", eval_delay=0),  # type: ignore[arg-type]
        state,
        unused,
    )
    assert [line["step"] for line in read_trajectory(tmp_path)] == [1, 2]
    assert "passed over a line" in caplog.text


def test_what_earlier_processes_measured_stays() -> None:
    """A run that is killed after its last step and goes on takes none in which it could measure anything."""
    trainer: Any = SimpleNamespace(last_report=None)
    first, second = StepMeter(trainer), StepMeter(trainer)
    assert first.median_step_seconds is None and first.earlier_peak_bytes == 0
    first.step_seconds = [9.0, 9.0, 1.0, 3.0, 2.0]
    second.restore({**first.totals(), "peak_bytes": 7.0})
    assert second.median_step_seconds == 2.0 and second.earlier_peak_bytes == 7
    second.step_seconds = [9.0, 9.0, 5.0]
    assert second.median_step_seconds == 5.0
