"""What a step reports, and that TensorBoard reads back what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rose_ds import StepReport, write_scalars

pytestmark = pytest.mark.fast

FULL = StepReport(
    step=7, eligible=200, tau_first=0.25, tau_second=1.5, kept_first=120, kept_second=60, grad_norm=2.0, skipped=False
)

#: (report, kept_fraction, scalars)
REPORTS: list[tuple[StepReport, float | None, dict[str, float]]] = [
    (
        FULL,
        0.45,
        {
            "rose/tau_first": 0.25,
            "rose/tau_second": 1.5,
            "rose/kept_first": 0.6,
            "rose/kept_second": 0.3,
            "rose/skipped": 0.0,
            "train/grad_norm": 2.0,
        },
    ),
    (
        StepReport(step=1, eligible=10, tau_second=0.0, kept_second=10),
        1.0,
        {
            "rose/tau_second": 0.0,
            "rose/kept_second": 1.0,
            "rose/skipped": 0.0,
        },
    ),
    (StepReport(step=0, eligible=0, grad_norm=0.5), None, {"rose/skipped": 0.0, "train/grad_norm": 0.5}),
    (StepReport(step=3, eligible=10, skipped=True), None, {"rose/skipped": 1.0}),
]


@pytest.mark.parametrize(("report", "kept", "scalars"), REPORTS, ids=range(len(REPORTS)))
def test_scalars(report: StepReport, kept: float | None, scalars: dict[str, float]) -> None:
    """Counts become fractions; what was not measured is left out, a threshold of 0 is not."""
    assert report.kept_fraction == pytest.approx(kept)
    assert report.scalars() == pytest.approx(scalars)


def test_tensorboard_reads_them_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        for step in (1, 2):
            write_scalars(writer, StepReport(**{**vars(FULL), "step": step, "tau_first": step / 4}))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(FULL.scalars())
    assert [(event.step, event.value) for event in events.Scalars("rose/tau_first")] == [(1, 0.25), (2, 0.5)]
    assert [event.value for event in events.Scalars("rose/kept_first")] == pytest.approx([0.6, 0.6])


def test_a_report_is_frozen() -> None:
    report: Any = FULL
    with pytest.raises(AttributeError):
        report.step = 8
