"""What stands beside a trained model: the command that made it, and the way there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rose_ds.experiments.card import card
from rose_ds.experiments.evaluation import TRAJECTORY, TrajectoryCallback, read_trajectory, write_lines
from rose_ds.experiments.metrics import Metrics

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
