"""What a step reports, and how it reaches TensorBoard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from rose_ds.core.layout import Layout
from rose_ds.core.mask import FIRST, SECOND
from rose_ds.core.select import Selection


@dataclass(frozen=True)
class StepReport:
    """One optimizer step; every number is global and the same on every rank."""

    step: int
    """Optimizer steps so far, this one included (a skipped one is not counted)."""
    eligible: int
    """How many parameters could be masked: scalars or tensors, by the granularity. Over all ranks, no padding."""
    tau_first: float | None = None
    """First-order threshold: the largest first-order risk that was still kept."""
    tau_second: float | None = None
    """Second-order threshold."""
    kept_first: int | None = None
    """How many parameters the first-order mask kept."""
    kept_second: int | None = None
    """How many parameters the second-order mask kept."""
    zeros_first: int | None = None
    """How many first-order risks are exactly zero: unused parameters, or a gradient too small for its precision."""
    zeros_second: int | None = None
    """The same of the second order: parameters without momentum yet, or whose gradient is zero."""
    grad_norm: float | None = None
    """L2 norm of the task gradient before clipping."""
    skipped: bool = False
    """True when a gradient was not finite and nothing was updated, on any rank."""
    kept_first_per_rank: tuple[int, ...] | None = None
    """kept_first by rank, where histograms are gathered: how evenly the shards are kept."""
    kept_second_per_rank: tuple[int, ...] | None = None
    """kept_second by rank."""

    @property
    def kept_fraction(self) -> float | None:
        """Mean fraction of eligible parameters kept, over the masks in use; None without a mask."""
        kept = [k for k in (self.kept_first, self.kept_second) if k is not None]
        return sum(kept) / len(kept) / self.eligible if kept else None

    def scalars(self) -> dict[str, float]:
        """Numbers worth plotting, by TensorBoard tag."""
        values: dict[str, float | None] = {
            "rose/tau_first": self.tau_first,
            "rose/tau_second": self.tau_second,
            "rose/kept_first": None if self.kept_first is None else self.kept_first / self.eligible,
            "rose/kept_second": None if self.kept_second is None else self.kept_second / self.eligible,
            "rose/zeros_first": None if self.zeros_first is None else self.zeros_first / self.eligible,
            "rose/zeros_second": None if self.zeros_second is None else self.zeros_second / self.eligible,
            "rose/skipped": float(self.skipped),
            "train/grad_norm": self.grad_norm,
        }
        return {tag: value for tag, value in values.items() if value is not None}


def report_of(
    step: int,
    layout: Layout,
    granularity: str,
    selection: Selection | None,
    grad_norm: float | None,
    *,
    skipped: bool,
) -> StepReport:
    """The report of a step that had ``selection`` for its masks; None: it had none."""
    per_element = granularity == "element"
    masks: dict[str, Any] = {}
    for which, bit in (("first", FIRST), ("second", SECOND)):
        threshold = None if selection is None else selection.thresholds.get(bit)
        if threshold is not None:
            masks[f"tau_{which}"] = threshold.value
            masks[f"kept_{which}"] = threshold.kept
            masks[f"zeros_{which}"] = threshold.zeros
            masks[f"kept_{which}_per_rank"] = threshold.kept_per_rank if per_element else None
    eligible = layout.element_count if per_element else layout.tensor_count
    return StepReport(step=step, eligible=eligible, grad_norm=grad_norm, skipped=skipped, **masks)


class ScalarWriter(Protocol):
    """The one method of torch.utils.tensorboard.SummaryWriter that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one point."""


def write_scalars(writer: ScalarWriter, report: StepReport) -> None:
    """Write a report's thresholds, kept fractions and gradient norm, at its step."""
    for tag, value in report.scalars().items():
        writer.add_scalar(tag, value, report.step)
