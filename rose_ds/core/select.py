"""One step's masks: scores -> global thresholds -> masks, for slices of tensors that may be spread over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rose_ds.core.automatic import CRITERIA
from rose_ds.core.layout import Layout
from rose_ds.core.magnitudes import ElementMagnitudes, StepInputs, TensorMagnitudes
from rose_ds.core.mask import FIRST, add_mask_, keep_count
from rose_ds.core.threshold import Threshold, kth_smallest, local_only

#: From magnitudes to what is ranked: non-negative, fp32.
Score = Callable[[Any], Tensor]
#: What a 0 in the mask means; see ``rose_ds.core.update``.
Rule = Literal["robust", "gradient", "update"]
_CHUNK = 1 << 21  # scores computed at a time: bounds the scratch memory
_KEPT = 1 << 24  # up to so many scores of this rank are kept while they are ranked, instead of computed four times


@dataclass(frozen=True)
class Selector:
    """One ranking of the eligible parameters: a score, which end of it is kept, and how much."""

    score: Score
    keep: float | str
    """Fraction of the eligible parameters, in (0, 1]; or the name of a criterion in ``rose_ds.core.automatic``."""
    largest: bool = False
    """Keep the highest scores instead of the lowest."""
    bit: int = FIRST
    """Of the mask's code."""
    ranks_risk: bool = False
    """The score is of the gradient kept apart, which nothing else looks at: not finite, it skips the step."""
    fixed: float | None = None
    """A threshold that is known, instead of ``keep``."""


@dataclass
class Selection:
    """Masks of one step. ``codes`` holds, for each slice, a uint8 tensor (element) or an int (tensor)."""

    codes: list[Tensor] | list[int] = field(default_factory=list)
    thresholds: dict[int, Threshold] = field(default_factory=dict)
    """By the bit of the code."""
    finite: bool = True
    """False when the ranked gradient holds inf or NaN somewhere: the step must be skipped, and there are no codes."""


def select(selectors: Sequence[Selector], granularity: str, inputs: StepInputs) -> Selection:
    """Masks for this rank's slices and the global thresholds behind them (Eq. 2 to 5).

    Every rank must call it, also one that holds nothing.
    """
    rank = _rank_elements if granularity == "element" else _rank_tensors
    selection = Selection(_empty_codes(granularity, inputs))
    for selector in selectors:
        threshold, add_mask = rank(selector, inputs)
        selection.thresholds[selector.bit] = threshold
        if selector.ranks_risk and (threshold.infinite or threshold.nan):
            return Selection([], selection.thresholds, finite=False)
        if threshold.nan:
            raise FloatingPointError(
                f"{threshold.nan} scores are NaN: exp_avg, a weight or the gradient is not finite. Resume from a "
                "checkpoint written before the loss diverged"
            )
        add_mask(selection.codes)
    return selection


def _empty_codes(granularity: str, inputs: StepInputs) -> list[Any]:
    if granularity == "tensor":
        return [0] * len(inputs.grads)
    return [torch.zeros(g.numel(), dtype=torch.uint8, device=g.device) for g in inputs.grads]


def _parts(numel: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, numel)) for start in range(0, numel, _CHUNK))


class _Kept:
    """Scores that are computed once."""

    def __init__(self, score: Callable[[int, slice], Tensor], sizes: Sequence[int]) -> None:
        parts = [[score(i, at) for at in _parts(n)] for i, n in enumerate(sizes)]
        self.values = [torch.cat(mine) if mine else torch.zeros(0) for mine in parts]

    def __call__(self, i: int, at: slice) -> Tensor:
        return self.values[i][at]


class _Lazy:
    """Scores asked for in each round of the threshold, a part of a slice at a time."""

    def __init__(self, score: Callable[[int, slice], Tensor], sizes: Sequence[int], indices: Sequence[int]) -> None:
        self.score, self.sizes, self.indices = score, sizes, indices

    def __iter__(self) -> Iterator[Tensor]:
        return (self.score(i, at) for i in self.indices for at in _parts(self.sizes[i]))


def _rank_elements(selector: Selector, inputs: StepInputs) -> tuple[Threshold, Callable[[list[Any]], None]]:
    layout, sizes = inputs.layout, [g.numel() for g in inputs.grads]

    def score(i: int, at: slice) -> Tensor:
        return selector.score(ElementMagnitudes(inputs, i, at))

    if sum(sizes) <= _KEPT:
        score = _Kept(score, sizes)

    values = [(_Lazy(score, sizes, layout.slices_of(e)), e) for e in layout.exchanges]
    threshold = _threshold(selector, values, layout.element_count)

    def add_mask(codes: list[Any]) -> None:
        for i, code in enumerate(codes):
            for at in _parts(code.numel()):
                add_mask_(code[at], score(i, at), threshold.value, selector.bit, largest=selector.largest)

    return threshold, add_mask


def _rank_tensors(selector: Selector, inputs: StepInputs) -> tuple[Threshold, Callable[[list[Any]], None]]:
    layout = inputs.layout
    scores = selector.score(TensorMagnitudes(inputs))
    # already global: every rank ranks the same few hundred numbers
    threshold = _threshold(selector, [([scores], local_only)], layout.tensor_count)

    def add_mask(codes: list[Any]) -> None:
        masks = torch.zeros(layout.tensor_count, dtype=torch.uint8)
        add_mask_(masks, scores, threshold.value, selector.bit, largest=selector.largest)
        for i, tensor in enumerate(layout.tensor_index):
            codes[i] |= int(masks[tensor])

    return threshold, add_mask


def _threshold(selector: Selector, values: Sequence[Any], count: int) -> Threshold:
    def rank(keep: int) -> int:
        """Of the last one kept, from the smallest."""
        return count - keep + 1 if selector.largest else keep

    if isinstance(selector.keep, str):
        criterion = CRITERIA[selector.keep]
        return kth_smallest(values, lambda histogram: rank(criterion(histogram)), largest=selector.largest)
    k = rank(keep_count(selector.keep, count))
    return kth_smallest(values, k, largest=selector.largest, fixed=selector.fixed)


def kept_by_tensor(layout: Layout, codes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Kept and all elements of each tensor over all ranks, fp64, shape (tensor_count,). A collective."""
    kept = layout.sums([(code != 0).sum() for code in codes])
    return kept, layout.sums([torch.tensor(code.numel()) for code in codes])
