"""One step's masks: risks -> global thresholds -> masks, for slices of tensors that may be spread over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rose_ds.config import RoseConfig
from rose_ds.core.mask import FIRST, SECOND, add_mask_, keep_count
from rose_ds.core.risk import first_order_risk, second_order_risk, squared_norms
from rose_ds.core.threshold import Exchange, Threshold, kth_smallest, local_only


@dataclass(frozen=True)
class Shards:
    """What this rank holds of the eligible parameters; lists are aligned, one entry a slice."""

    tensor_index: Sequence[int]
    """Which eligible tensor (0 .. tensor_count - 1, numbered alike on every rank) a slice is part of."""
    exchange_of: Sequence[Exchange]
    """How a slice's ranks exchange counts and sums; slices with the same exchange are added before it is called."""
    exchanges: Sequence[Exchange]
    """Every exchange of the model, in the same order on every rank, whether or not this rank holds a slice of it."""
    tensor_count: int
    element_count: int
    """Over all ranks; padding and replicas not counted."""


@dataclass
class Selection:
    """Masks of one step. ``codes`` holds, for each slice, a uint8 tensor (element) or an int (tensor)."""

    codes: list[Tensor] | list[int] = field(default_factory=list)
    first: Threshold | None = None
    second: Threshold | None = None

    @property
    def finite(self) -> bool:
        """False when the KL gradient holds inf or NaN somewhere: the step must be skipped."""
        return self.first is None or not (self.first.infinite or self.first.nan)


@dataclass(frozen=True)
class SecondOrderInputs:
    """Eq. 4's inputs for each slice."""

    grads: Sequence[Tensor]
    """Any floating type."""
    exp_avgs: Sequence[Tensor]
    beta1s: Sequence[float]
    scale: Tensor | float = 1.0
    """What ``grads`` are still to be multiplied with."""


#: Computes the risks of a part of a slice.
Risk = Callable[[int, slice], Tensor]
_CHUNK = 1 << 21  # risks computed at a time: bounds the scratch memory


def _parts(numel: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK) for start in range(0, numel, _CHUNK))


class _Lazy:
    """Risks computed anew for each round of the threshold, a part of a slice at a time."""

    def __init__(self, risk: Risk, sizes: Sequence[Tensor], indices: Sequence[int]) -> None:
        self.risk, self.sizes, self.indices = risk, sizes, indices

    def __iter__(self) -> Iterator[Tensor]:
        return (self.risk(i, at) for i in self.indices for at in _parts(self.sizes[i].numel()))


def select(
    config: RoseConfig,
    shards: Shards,
    kl_grads: Sequence[Tensor] | None,
    second: SecondOrderInputs | None,
) -> Selection:
    """Masks for this rank's slices and the global thresholds behind them (Eq. 2 to 5).

    Every rank must call it, also one that holds nothing. Returns without codes when ``finite`` is False.
    """
    choose = _select_elements if config.granularity == "element" else _select_tensors
    return choose(config, shards, kl_grads, second)


def _select_elements(
    config: RoseConfig, shards: Shards, kl_grads: Sequence[Tensor] | None, second: SecondOrderInputs | None
) -> Selection:
    selection = Selection()
    slices = kl_grads if kl_grads is not None else second.grads if second is not None else []

    def threshold(risk: Risk, keep: float) -> Threshold:
        parts = []
        for exchange in shards.exchanges:
            mine = [i for i, e in enumerate(shards.exchange_of) if e is exchange]
            parts.append((_Lazy(risk, slices, mine), exchange))
        return kth_smallest(parts, keep_count(keep, shards.element_count))

    def add_masks(risk: Risk, tau: float, bit: int) -> None:
        for i, code in enumerate(codes):
            for at in _parts(code.numel()):
                add_mask_(code[at], risk(i, at), tau, bit)

    if kl_grads is not None:

        def first_risk(i: int, at: slice) -> Tensor:
            return first_order_risk(kl_grads[i][at])

        selection.first = threshold(first_risk, config.keep_first)
        if not selection.finite:
            return selection
    codes = [torch.zeros(t.numel(), dtype=torch.uint8, device=t.device) for t in slices]
    if selection.first is not None:
        add_masks(first_risk, selection.first.value, FIRST)
    if second is not None:

        def second_risk(i: int, at: slice) -> Tensor:
            grad = second.grads[i][at].float()
            return second_order_risk(grad.mul(second.scale), second.exp_avgs[i][at], second.beta1s[i])

        selection.second = threshold(second_risk, config.keep_second)
        _check_momentum(selection.second)
        add_masks(second_risk, selection.second.value, SECOND)
    selection.codes = codes
    return selection


def _select_tensors(
    config: RoseConfig, shards: Shards, kl_grads: Sequence[Tensor] | None, second: SecondOrderInputs | None
) -> Selection:
    selection = Selection()
    codes = torch.zeros(shards.tensor_count, dtype=torch.uint8)

    def norms(slices: Sequence[Tensor], scales: Sequence[float] | None = None) -> Tensor:
        total = torch.zeros(shards.tensor_count, dtype=torch.float64)
        for exchange in shards.exchanges:
            mine = [i for i, e in enumerate(shards.exchange_of) if e is exchange]
            local = squared_norms(
                [slices[i] for i in mine],
                [shards.tensor_index[i] for i in mine],
                shards.tensor_count,
                None if scales is None else [scales[i] for i in mine],
            )
            total += exchange(local).sum(0).cpu()
        return total.sqrt().float()

    def threshold(risk: Tensor, keep: float) -> Threshold:
        # the norms are already global: every rank ranks the same few hundred numbers
        return kth_smallest([([risk], local_only)], keep_count(keep, shards.tensor_count))

    if kl_grads is not None:
        risk = norms(kl_grads)
        selection.first = threshold(risk, config.keep_first)
        if not selection.finite:
            return selection
        add_mask_(codes, risk, selection.first.value, FIRST)
    if second is not None:
        # alpha belongs to the tensor's group, which a rank without a slice of it does not know: scale before the sum
        alphas = [float(second.scale) * (1 - beta1) for beta1 in second.beta1s]
        risk = second_order_risk(norms(second.grads, alphas), norms(second.exp_avgs), beta1=0.0)
        selection.second = threshold(risk, config.keep_second)
        _check_momentum(selection.second)
        add_mask_(codes, risk, selection.second.value, SECOND)
    selection.codes = codes[list(shards.tensor_index)].tolist()
    return selection


def _check_momentum(second: Threshold) -> None:
    if second.nan:
        raise FloatingPointError(
            f"{second.nan} second-order risks are NaN: exp_avg or the gradient is not finite. "
            "Resume from a checkpoint written before the loss diverged"
        )
