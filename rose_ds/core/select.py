"""One step's masks: scores -> global thresholds -> masks, for slices of tensors that may be spread over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from rose_ds.core.automatic import CRITERIA
from rose_ds.core.counting import Compiled, Lazy, LazyOnDevice, can_compile, compiled_on_device, score_of
from rose_ds.core.device import OnDevice, kth_smallest_on_device
from rose_ds.core.layout import Layout
from rose_ds.core.magnitudes import StepInputs, TensorMagnitudes
from rose_ds.core.mask import FIRST, BitMask, add_mask_, keep_count
from rose_ds.core.threshold import Threshold, Wanted, kth_smallest, kth_smallest_of_each, local_only

#: From magnitudes to what is ranked: non-negative, fp32.
Score = Callable[[Any], Tensor]
#: What a 0 in the mask means; see ``rose_ds.core.update``.
Rule = Literal["robust", "gradient", "update"]


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
    """A threshold that is known, instead of ``keep``; see ``rose_ds.core.threshold.Wanted``."""
    kernel: Literal["first", "second", "gradient", "uniform", "agreement"] | None = None
    """Which score it is, where compiled kernels know it (``rose_ds.kernels``)."""


@dataclass
class Selection:
    """Masks of one step. ``codes`` holds, for each slice, a uint8 tensor or its bits (element), or an int (tensor)."""

    codes: list[Tensor] | list[BitMask] | list[int] = field(default_factory=list)
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
    device: torch.device | None = None,
    used: Sequence[BitMask] = (),
) -> Selection:
    """Masks for this rank's slices and the global thresholds behind them (Eq. 2 to 5).

    Every rank must call it, also one that holds nothing. ``kernels`` (``rose_ds.kernels``) compute the same bits; ranks
    may differ in having them. ``histograms``: every threshold brings its histogram, which takes one more look at the
    scores where they are many. ``device``: where all slices of every rank lie on accelerators, this rank's; elements
    are then ranked there, and the host reads from it once, whatever the number of slices. The outcome is the same.
    ``used``: codes of an earlier step whose memory may be taken.

    Raises:
        FloatingPointError: a score is NaN, other than of a gradient that is only ranked.
        ValueError: a score is negative, or fewer are counted than the layout says; on every rank alike.
    """
    codes: list[Any]
    if granularity == "element" and device is not None:
        codes = _empty_codes(granularity, inputs)
        return _outcome(codes, _rank_on_device(selectors, inputs, codes, kernels, device))
    if granularity == "element" and all(can_compile(kernels, selector, inputs) for selector in selectors):
        codes = _bit_masks([selector.bit for selector in selectors], inputs, used)
    else:
        codes = _empty_codes(granularity, inputs)
        kernels = kernels if granularity == "tensor" else None
    return _outcome(codes, _rank(selectors, granularity, inputs, codes, kernels, histograms))


def _outcome(codes: list[Any], ranked: Iterator[tuple[Selector, Threshold]]) -> Selection:
    """Thresholds one by one, until one says that the step cannot be made."""
    selection = Selection(codes)
    for selector, threshold in ranked:
        selection.thresholds[selector.bit] = threshold
        if selector.ranks_risk and (threshold.infinite or threshold.nan):
            return Selection([], selection.thresholds, finite=False)
        if threshold.nan:
            raise FloatingPointError(
                f"{threshold.nan} scores are NaN: exp_avg, a weight or the gradient is not finite. Resume from a "
                "checkpoint written before the loss diverged"
            )
    return selection


def _rank(
    selectors: Sequence[Selector],
    granularity: str,
    inputs: StepInputs,
    codes: list[Any],
    kernels: Any | None,
    histograms: bool,
) -> Iterator[tuple[Selector, Threshold]]:
    """All rankings; each marks the codes when the next one is asked for."""
    rank = _rank_tensors if granularity == "tensor" else partial(_rank_elements, histograms=histograms)
    for selector, (threshold, add_mask) in zip(selectors, rank(selectors, inputs, codes, kernels), strict=True):
        yield selector, threshold
        add_mask()


def _rank_on_device(
    selectors: Sequence[Selector], inputs: StepInputs, codes: list[Tensor], kernels: Any | None, device: torch.device
) -> Iterator[tuple[Selector, Threshold]]:
    """All rankings together; the codes are marked before anything is known on the host."""
    layout, values = inputs.layout, list[OnDevice]()
    for exchange in layout.exchanges:
        compiled = compiled_on_device(kernels, selectors, inputs, codes, layout.slices_of(exchange))
        if compiled is not None:
            values.append(compiled)
    if len(values) < len(layout.exchanges):
        scores = [score_of(selector, inputs) for selector in selectors]
        values = [LazyOnDevice(selectors, scores, codes, layout.slices_of(e), device) for e in layout.exchanges]
    spreads = list(zip(values, layout.exchanges, strict=True))
    wanted = [_wanted(selector, layout.element_count) for selector in selectors]
    taus, thresholds = kth_smallest_on_device(spreads, wanted, device)
    for part in values:
        part.mark(taus)
    return zip(selectors, thresholds, strict=True)


def _empty_codes(granularity: str, inputs: StepInputs) -> list[Any]:
    if granularity == "tensor":
        return [0] * len(inputs.grads)
    return [torch.zeros(g.numel(), dtype=torch.uint8, device=g.device) for g in inputs.grads]


def _bit_masks(bits: Sequence[int], inputs: StepInputs, used: Sequence[BitMask]) -> list[BitMask]:
    """Of an earlier step, where they fit: fresh pages cost as much as a scan."""
    sizes = [g.numel() for g in inputs.grads]
    if [(mask.numel, mask.bits) for mask in used] == [(n, tuple(bits)) for n in sizes]:
        return list(used)
    return [BitMask.empty(n, bits) for n in sizes]


#: A threshold, and what marks the codes by it.
_Ranked = Iterable[tuple[Threshold, Callable[[], None]]]


def _rank_elements(
    selectors: Sequence[Selector],
    inputs: StepInputs,
    codes: Sequence[Any],
    kernels: Any | None,
    histograms: bool,
) -> _Ranked:
    """All rankings together."""
    layout, values = inputs.layout, list[list[Any]]()
    for selector in selectors:
        held: partial[Any]
        if kernels is not None:
            held = partial(Compiled, kernels, selector, inputs, codes)
        else:
            held = partial(Lazy, selector, score_of(selector, inputs, len(selectors)), codes)
        values.append([held(layout.slices_of(exchange)) for exchange in layout.exchanges])
    spreads = list(zip(zip(*values, strict=True), layout.exchanges, strict=True))
    wanted = [_wanted(selector, layout.element_count) for selector in selectors]
    found = kth_smallest_of_each(spreads, wanted, None if histograms else layout.element_count)
    return [(threshold, partial(_mark, mine, threshold)) for threshold, mine in zip(found, values, strict=True)]


def _mark(values: Sequence[Lazy | Compiled], threshold: Threshold) -> None:
    for part in values:
        part.mark(threshold.value)


def _rank_tensors(selectors: Sequence[Selector], inputs: StepInputs, codes: list[Any], kernels: Any | None) -> _Ranked:
    """One ranking after the other, on every rank alike: they are of the same few hundred numbers."""
    layout = inputs.layout
    for selector in selectors:
        scores, wanted = selector.score(TensorMagnitudes(inputs, kernels)), _wanted(selector, layout.tensor_count)
        threshold = kth_smallest([([scores], local_only)], wanted.k, largest=wanted.largest, fixed=wanted.fixed)
        yield threshold, partial(_mark_tensors, selector, scores, threshold, layout, codes)


def _mark_tensors(selector: Selector, scores: Tensor, threshold: Threshold, layout: Layout, codes: list[Any]) -> None:
    masks = torch.zeros(layout.tensor_count, dtype=torch.uint8)
    add_mask_(masks, scores, threshold.value, selector.bit, largest=selector.largest)
    for i, tensor in enumerate(layout.tensor_index):
        codes[i] |= int(masks[tensor])


def _wanted(selector: Selector, count: int) -> Wanted:
    """Of ``count`` scores, which one is the threshold."""

    def rank(keep: int) -> int:
        """Of the last one kept, from the smallest."""
        return count - keep + 1 if selector.largest else keep

    if isinstance(selector.keep, str):
        criterion = CRITERIA[selector.keep]
        return Wanted(lambda histogram: rank(max(1, criterion(histogram))), selector.largest)
    return Wanted(rank(keep_count(selector.keep, count)), selector.largest, selector.fixed)


def kept_by_tensor(layout: Layout, codes: Sequence[Tensor | BitMask]) -> Tensor:
    """Kept elements of each tensor over all ranks, fp64, shape (tensor_count,). A collective."""
    return layout.sums([code.kept() if isinstance(code, BitMask) else (code != 0).sum() for code in codes])
