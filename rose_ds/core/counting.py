"""Scores of elements that are counted and marked where they lie: by torch, by kernels, or on an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rose_ds.core.counted import FACTS, Chunks, bits_of, facts_of
from rose_ds.core.device import OnDevice
from rose_ds.core.magnitudes import ElementMagnitudes, StepInputs, keys
from rose_ds.core.mask import BitMask, add_mask_
from rose_ds.kernels import fits

if TYPE_CHECKING:
    from rose_ds.core.select import Selector

#: The scores of a part of a slice, given the slice's number and which of its elements: fp32, 1-D.
ScorePart = Callable[[int, slice], Tensor]
_CHUNK = 1 << 21  # scores computed at a time: bounds the scratch memory
_KEPT = 1 << 24  # up to so many scores of this rank are kept while they are ranked, instead of computed four times


def _parts(numel: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, numel)) for start in range(0, numel, _CHUNK))


class _Kept:
    """Scores that are computed once."""

    def __init__(self, score: ScorePart, sizes: Sequence[int]) -> None:
        parts = [[score(i, at) for at in _parts(n)] for i, n in enumerate(sizes)]
        self.values = [torch.cat(mine) if mine else torch.zeros(0) for mine in parts]

    def __call__(self, i: int, at: slice) -> Tensor:
        return self.values[i][at]


def score_of(selector: Selector, inputs: StepInputs, rankings: int = 1) -> ScorePart:
    """A selector's scores of this rank's slices, kept where they are few, as are all of several ``rankings``."""
    sizes = [g.numel() for g in inputs.grads]

    def score(i: int, at: slice) -> Tensor:
        return selector.score(ElementMagnitudes(inputs, i, at))

    return _Kept(score, sizes) if sum(sizes) * rankings <= _KEPT else score


class Lazy(Chunks):
    """Scores asked for in each round of the threshold, a part of a slice at a time; and their bit of the codes."""

    def __init__(self, selector: Selector, score: ScorePart, codes: Sequence[Tensor], indices: Sequence[int]) -> None:
        super().__init__()
        self.selector, self.score, self.codes, self.indices = selector, score, codes, indices

    def chunks(self) -> Iterator[Tensor]:
        return (self.score(i, at) for i in self.indices for at in _parts(self.codes[i].numel()))

    def every(self, stride: int) -> Iterator[Tensor]:
        start = 0
        for i in self.indices:
            size = self.codes[i].numel()
            yield self.score(i, slice(start, size, stride))
            start = (start - size) % stride

    def mark(self, tau: float | Tensor) -> None:
        """Set the selector's bit where scores are kept."""
        bit, largest = self.selector.bit, self.selector.largest
        for i in self.indices:
            for at in _parts(self.codes[i].numel()):
                add_mask_(self.codes[i][at], self.score(i, at), tau, bit, largest=largest)


class Compiled:
    """Risks that kernels compute, count and mark, with no tensor of them anywhere."""

    def __init__(
        self, kernels: Any, selector: Selector, inputs: StepInputs, masks: Sequence[BitMask], indices: Sequence[int]
    ) -> None:
        mine = [masks[i] for i in indices]
        plane = mine[0].bits.index(selector.bit) if mine else 0
        self.kernels = kernels
        words = [mask.words for mask in mine]
        self.risks = kernels.Risks(
            **_read(selector, inputs, indices), masks=words, plane=plane, largest=selector.largest
        )

    def histogram(self, prefix: int, shift: int, width: int) -> Tensor:
        counts: Tensor = self.risks.histogram(prefix, shift, width)
        return counts

    def sample(self, stride: int) -> Tensor:
        counts: Tensor = self.risks.sample(stride)
        return counts

    def zoom(self, low: int, high: int) -> Tensor:
        counts: Tensor = self.risks.zoom(low, high)
        return counts

    def scan(self, low: int, high: int) -> Tensor:
        row: Tensor = self.risks.scan(low, high)  # and marks what it is sure of
        return row

    @staticmethod
    def scan_together(values: Sequence[Compiled], windows: Sequence[tuple[int, int]]) -> list[Tensor]:
        """``scan`` of several rankings, each in its window, in one look at the memory."""
        lows, highs = zip(*windows, strict=True)
        rows: list[Tensor] = values[0].kernels.Risks.scan_together([v.risks for v in values], list(lows), list(highs))
        return rows

    def mark(self, tau: float) -> None:
        """Set the selector's bit where risks are kept."""
        self.risks.mark(tau)


def _read(selector: Selector, inputs: StepInputs, indices: Sequence[int]) -> dict[str, Any]:
    """What a compiled score is computed from."""

    def mine(columns: Sequence[Any]) -> list[Any]:
        return [columns[i] for i in indices]

    if selector.kernel == "first":
        assert inputs.risk_grads is not None
        return {"grads": mine(inputs.risk_grads)}
    read: dict[str, Any] = {"grads": mine(inputs.grads)}
    if selector.kernel == "uniform":
        draws = [(inputs.layout.blocks[i].first, *keys(inputs, inputs.layout.name_of(i))) for i in indices]
        return {**read, "draws": draws}
    read["scale"] = float(inputs.scale)
    if inputs.share and inputs.risk_grads is not None:
        read |= {"others": mine(inputs.risk_grads), "share": inputs.share * inputs.clip}
    if selector.kernel in ("second", "agreement"):
        read |= {"exp_avgs": mine(inputs.exp_avgs), "alphas": [1 - beta1 for beta1 in mine(inputs.beta1s)]}
        read["agreement"] = selector.kernel == "agreement"
    return read


def can_compile(kernels: Any, selector: Selector, inputs: StepInputs) -> bool:
    """Whether these are kernels for CPUs that know this score and take these tensors."""
    if not hasattr(kernels, "Risks"):
        return False
    if selector.kernel == "first":
        return all(fits(g) for g in inputs.risk_grads or [])
    if selector.kernel == "uniform":
        return all(g.is_cpu for g in inputs.grads) and all(b.first is not None for b in inputs.layout.blocks)
    if selector.kernel is None:
        return False
    others = [] if inputs.risk_grads is None or not inputs.share else inputs.risk_grads
    moments = inputs.exp_avgs if selector.kernel in ("second", "agreement") else []
    return all(fits(g, half=True) for g in inputs.grads) and all(map(fits, (*moments, *others)))


def compiled_on_device(
    kernels: Any, selectors: Sequence[Selector], inputs: StepInputs, codes: Sequence[Tensor], indices: Sequence[int]
) -> OnDevice | None:
    """Risks that kernels for accelerators compute, count and mark; None where they do not know a score, or do not take
    a tensor, of this rank.
    """
    kinds = [selector.kernel for selector in selectors]
    if not hasattr(kernels, "risks_on_device") or kinds not in (["first"], ["second"], ["first", "second"]):
        return None
    by_kind = {selector.kernel: selector for selector in selectors}
    grads = inputs.grads if "second" in by_kind else []
    exp_avgs = inputs.exp_avgs if "second" in by_kind else []
    share = inputs.share * inputs.clip if "second" in by_kind and inputs.risk_grads is not None else 0.0
    risk_grads = inputs.risk_grads or [] if "first" in by_kind or share else []
    if not all(kernels.fits(g, half=True) for g in grads) or not all(map(kernels.fits, (*exp_avgs, *risk_grads))):
        return None
    found: OnDevice = kernels.risks_on_device(
        grads=[grads[i] for i in indices] if grads else [],
        exp_avgs=[exp_avgs[i] for i in indices] if exp_avgs else [],
        risk_grads=[risk_grads[i] for i in indices] if risk_grads else [],
        alphas=[1 - inputs.beta1s[i] for i in indices],
        scale=inputs.scale,
        share=share,
        codes=[codes[i] for i in indices],
        first=by_kind["first"].bit if "first" in by_kind else 0,
        second=by_kind["second"].bit if "second" in by_kind else 0,
        largest=tuple(kind in by_kind and by_kind[kind].largest for kind in ("first", "second")),
    )
    return found


class LazyOnDevice:
    """``rose_ds.core.device.OnDevice`` by torch's operations, none of which waits for the device."""

    def __init__(
        self,
        selectors: Sequence[Selector],
        scores: Sequence[ScorePart],
        codes: Sequence[Tensor],
        indices: Sequence[int],
        device: torch.device,
    ) -> None:
        self.device = device
        ranked = zip(selectors, scores, strict=True)
        self.kinds = [Lazy(selector, score, codes, indices) for selector, score in ranked]

    def histogram(self, prefixes: Tensor, shift: int, width: int) -> Tensor:
        # Twice the bins: the others have as many of their own, or one address would get nearly all of the additions.
        # bincount would read its largest value, and an index by a mask the number of ones.
        found = torch.zeros(len(self.kinds), 2 << width, dtype=torch.int64, device=self.device)
        one = torch.ones((), dtype=torch.int64, device=self.device)
        for kind, values in enumerate(self.kinds):
            for chunk in values.chunks():
                bits = bits_of(chunk)
                digits = ((bits >> shift) & ((1 << width) - 1)).long()
                if shift + width < 32:
                    digits += ((bits >> (shift + width)) != prefixes[kind]).long() << width
                found[kind].scatter_add_(0, digits, one.expand(len(digits)))
        return found[:, : 1 << width]

    def facts(self, bounds: Tensor) -> Tensor:
        found = torch.zeros(len(self.kinds), FACTS, dtype=torch.int64, device=self.device)
        for kind, values in enumerate(self.kinds):
            for chunk in values.chunks():
                found[kind] += facts_of(bits_of(chunk), bounds[kind])
        return found

    def mark(self, taus: Tensor) -> None:
        for kind, values in enumerate(self.kinds):
            values.mark(taus[kind])
