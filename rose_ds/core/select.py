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
from rose_ds.core.threshold import Chunks, Spread, Threshold, kth_smallest, local_only
from rose_ds.kernels import fits

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
    kernel: Literal["first", "second"] | None = None
    """Which risk the score is, where compiled kernels know it (``rose_ds.kernels``)."""


@dataclass
class Selection:
    """Masks of one step. ``codes`` holds, for each slice, a uint8 tensor (element) or an int (tensor)."""

    codes: list[Tensor] | list[int] = field(default_factory=list)
    thresholds: dict[int, Threshold] = field(default_factory=dict)
    """By the bit of the code."""
    finite: bool = True
    """False when the ranked gradient holds inf or NaN somewhere: the step must be skipped, and there are no codes."""


def select(
    selectors: Sequence[Selector],
    granularity: str,
    inputs: StepInputs,
    kernels: Any | None = None,
    *,
    histograms: bool = False,
) -> Selection:
    """Masks for this rank's slices and the global thresholds behind them (Eq. 2 to 5).

    Every rank must call it, also one that holds nothing. ``kernels`` (``rose_ds.kernels``) compute the same bits; ranks
    may differ in having them. ``histograms``: every threshold brings its histogram, which takes one more look at the
    scores where they are many.
    """
    selection = Selection(_empty_codes(granularity, inputs))
    for selector in selectors:
        if granularity == "element":
            threshold, add_mask = _rank_elements(selector, inputs, selection.codes, kernels, histograms)
        else:
            threshold, add_mask = _rank_tensors(selector, inputs)
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


class _Lazy(Chunks):
    """Scores asked for in each round of the threshold, a part of a slice at a time."""

    def __init__(self, score: Callable[[int, slice], Tensor], sizes: Sequence[int], indices: Sequence[int]) -> None:
        super().__init__()
        self.score, self.sizes, self.indices = score, sizes, indices

    def chunks(self) -> Iterator[Tensor]:
        return (self.score(i, at) for i in self.indices for at in _parts(self.sizes[i]))

    def every(self, stride: int) -> Iterator[Tensor]:
        start = 0
        for i in self.indices:
            yield self.score(i, slice(start, self.sizes[i], stride))
            start = (start - self.sizes[i]) % stride

    def mark(self, selector: Selector, tau: float, codes: Sequence[Tensor]) -> None:
        for i in self.indices:
            for at in _parts(self.sizes[i]):
                add_mask_(codes[i][at], self.score(i, at), tau, selector.bit, largest=selector.largest)


class _Compiled:
    """Risks that kernels compute, count and mark, with no tensor of them anywhere."""

    def __init__(
        self, kernels: Any, selector: Selector, inputs: StepInputs, codes: Sequence[Tensor], indices: Sequence[int]
    ) -> None:
        if selector.kernel == "first":
            assert inputs.risk_grads is not None
            numbers: tuple[Any, ...] = ([inputs.risk_grads[i] for i in indices], [], [], 1.0)
        else:
            grads, exp_avgs = [inputs.grads[i] for i in indices], [inputs.exp_avgs[i] for i in indices]
            numbers = (grads, exp_avgs, [1 - inputs.beta1s[i] for i in indices], float(inputs.scale))
        self.risks = kernels.Risks(*numbers, [codes[i] for i in indices], selector.bit, selector.largest)

    def histogram(self, prefix: int, shift: int, width: int) -> Tensor:
        counts: Tensor = self.risks.histogram(prefix, shift, width)
        return counts

    def sample(self, stride: int) -> Tensor:
        counts: Tensor = self.risks.sample(stride)
        return counts

    def scan(self, low: int, high: int) -> Tensor:
        row: Tensor = self.risks.scan(low, high)  # and marks what it is sure of
        return row

    def mark(self, selector: Selector, tau: float, codes: Sequence[Tensor]) -> None:
        self.risks.mark(tau)


def _can_compile(selector: Selector, inputs: StepInputs) -> bool:
    if selector.kernel == "first":
        return all(fits(g) for g in inputs.risk_grads or [])
    if selector.kernel == "second":
        return not inputs.share and all(fits(g, half=True) for g in inputs.grads) and all(map(fits, inputs.exp_avgs))
    return False


def _rank_elements(
    selector: Selector, inputs: StepInputs, codes: Sequence[Any], kernels: Any | None, histograms: bool
) -> tuple[Threshold, Callable[[list[Any]], None]]:
    layout = inputs.layout
    values: list[_Lazy | _Compiled]
    if kernels is not None and _can_compile(selector, inputs):
        values = [_Compiled(kernels, selector, inputs, codes, layout.slices_of(e)) for e in layout.exchanges]
    else:
        sizes = [g.numel() for g in inputs.grads]

        def score(i: int, at: slice) -> Tensor:
            return selector.score(ElementMagnitudes(inputs, i, at))

        if sum(sizes) <= _KEPT:
            score = _Kept(score, sizes)
        values = [_Lazy(score, sizes, layout.slices_of(e)) for e in layout.exchanges]
    spreads = list(zip(values, layout.exchanges, strict=True))
    threshold = _threshold(selector, spreads, layout.element_count, guided=not histograms)

    def add_mask(codes: list[Any]) -> None:
        for part in values:
            part.mark(selector, threshold.value, codes)

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


def _threshold(selector: Selector, spreads: Sequence[Spread], count: int, *, guided: bool = False) -> Threshold:
    def rank(keep: int) -> int:
        """Of the last one kept, from the smallest."""
        return count - keep + 1 if selector.largest else keep

    if isinstance(selector.keep, str):
        criterion = CRITERIA[selector.keep]
        return kth_smallest(spreads, lambda histogram: rank(max(1, criterion(histogram))), largest=selector.largest)
    k = rank(keep_count(selector.keep, count))
    known = count if guided else None
    return kth_smallest(spreads, k, largest=selector.largest, fixed=selector.fixed, count=known)


def kept_by_tensor(layout: Layout, codes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Kept and all elements of each tensor over all ranks, fp64, shape (tensor_count,). A collective."""
    kept = layout.sums([(code != 0).sum() for code in codes])
    return kept, layout.sums([torch.tensor(code.numel()) for code in codes])
