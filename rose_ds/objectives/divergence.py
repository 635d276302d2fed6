"""Divergence between two predictions of one batch (Eq. 1), and first-order risk made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, logsigmoid

from rose_ds.objectives.base import MicroBatch
from rose_ds.objectives.chunked import LARGE, LOWEST, ChunkedSymmetricKl

#: What the last dimension of logits is: classes of which one is true, or labels of which each is true or not.
Distribution = Literal["categorical", "bernoulli"]


def _categorical() -> Distribution:
    return "categorical"


@dataclass(frozen=True)
class Comparison:
    """How two predictions of a micro-batch are compared."""

    distribution: Callable[[], Distribution] = _categorical
    """Asked after the first forward pass: some models say it no earlier."""
    positions: Tensor | None = None
    """Bool, the logits' shape without the last dimension: which of them are predictions (of tokens: the labelled)."""
    count: Tensor | float | None = None
    """What a mean over the positions divides by; None: their number."""

    def symmetric_kl(
        self, logits_a: Tensor, logits_b: Tensor, *, reduction: str = "mean", fixed_targets: bool = False
    ) -> Tensor:
        """Eq. 1; see the function of this name."""
        return symmetric_kl(
            *(self._selected(z) for z in (logits_a, logits_b)),
            reduction=reduction,
            fixed_targets=fixed_targets,
            distribution=self.distribution(),
            count=self.count,
        )

    def summed_kl(self, logits: Tensor, target: Tensor) -> Tensor:
        """``KL(prediction || target)`` summed over the batch, so that it does not depend on the number of ranks."""
        return _kl(*_rows(self._selected(logits), self._selected(target), self.distribution()))

    def disagreement(self, logits_a: Tensor, logits_b: Tensor) -> Tensor:
        """Fraction of the predictions that give two answers (Table 4): another class, or any other label."""
        a, b = (self._selected(z.detach()) for z in (logits_a, logits_b))
        differ = ((a > 0) != (b > 0)).any(-1) if self.distribution() == "bernoulli" else a.argmax(-1) != b.argmax(-1)
        return differ.float().sum() / max(1, differ.numel())  # no token of it may be labelled

    def of_rows(self, rows: Tensor, batch: int | None = None) -> Comparison:
        """The comparison of some rows of a micro-batch alone, ``count`` in proportion; their mean where nobody knows of
        how many they are (``batch``, or as many as there are ``positions``).
        """
        batch = batch if self.positions is None else len(self.positions)
        count = None if self.count is None or batch is None else self.count * (len(rows) / batch)
        positions = None if self.positions is None else self.positions[rows.to(self.positions.device)]
        return replace(self, positions=positions, count=count)

    def _selected(self, logits: Tensor) -> Tensor:
        if self.positions is None:
            return logits
        if self.positions.shape != logits.shape[:-1]:
            raise ValueError(
                f"positions of shape {tuple(self.positions.shape)} do not fit logits of shape {tuple(logits.shape)}: "
                "they have the logits' shape without its last dimension"
            )
        return logits[self.positions.to(logits.device)]


def symmetric_kl(
    logits_a: Tensor,
    logits_b: Tensor,
    *,
    reduction: str = "mean",
    fixed_targets: bool = False,
    distribution: Distribution = "categorical",
    count: Tensor | float | None = None,
) -> Tensor:
    """Eq. 1: ``KL(P_a || P_b) + KL(P_b || P_a)``, in fp32, mean over the batch (or its sum).

    Args:
        logits_a, logits_b: shape (..., classes), the same; leading dimensions are all batch.
        reduction: ``mean`` or ``sum`` over the batch.
        fixed_targets: each divergence moves its second argument alone, towards a first that stands still. The value is
            the same, its gradient about half.
        distribution: ``categorical``: a softmax over the last dimension; ``bernoulli``: a sigmoid of each, whose
            divergences add up (multi-label classification).
        count: what the mean divides by; None: the number of rows.

    Returns:
        Scalar tensor in nats, with a graph to both inputs.

    Raises:
        ValueError: shapes differ, or there are fewer than two classes (a softmax over one class is constant).
    """
    if logits_a.shape != logits_b.shape or logits_a.dim() == 0:
        raise ValueError(f"logits of two passes must have one shape, got {logits_a.shape=} and {logits_b.shape=}")
    classes = logits_a.shape[-1]
    if classes < 2 and distribution == "categorical":
        raise ValueError(f"logits have {classes} class(es): the KL between two passes needs at least 2 (regression?)")
    if distribution == "categorical" and logits_a.numel() >= LARGE:
        a, b = (z.float().reshape(-1, classes) for z in (logits_a, logits_b))
        total: Tensor = ChunkedSymmetricKl.apply(a, b, fixed_targets)
    else:
        a, b = _rows(logits_a, logits_b, distribution)
        first_a, first_b = (a.detach(), b.detach()) if fixed_targets else (a, b)
        total = _kl(first_b, a) + _kl(first_a, b)
    if reduction == "sum":
        return total
    if reduction != "mean":
        raise ValueError(f"{reduction=} is not one of ['mean', 'sum']")
    # a micro-batch without a labelled token has no divergence, as it has no loss
    return total / (max(1, logits_a.shape[:-1].numel()) if count is None else count)


def _rows(a: Tensor, b: Tensor, distribution: Distribution) -> tuple[Tensor, Tensor]:
    """Log-probabilities in fp32: (rows, classes), or of both outcomes of each label: (2, ...)."""
    a, b = (z.float().reshape(-1, z.shape[-1]) for z in (a, b))
    if distribution == "categorical":
        return log_softmax(a, -1), log_softmax(b, -1)
    return torch.stack([logsigmoid(a), logsigmoid(-a)]), torch.stack([logsigmoid(b), logsigmoid(-b)])


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p || q)``, summed over all outcomes. One that both rule out (masked logits of -inf) has no part in it."""
    log_p, log_q = (log.clamp_min(LOWEST) for log in (log_p, log_q))  # 0 times their difference is 0 then, and not NaN
    return kl_div(log_q, log_p, log_target=True, reduction="sum")


def dropout_risk(batch: MicroBatch, a: Any = None) -> None:
    """First-order risk for objectives without two dropout passes of their own: of ``a`` and another, or of two more."""
    if not batch.wants_risk:
        return
    if batch.one_sided:
        batch.one_sided_risk(a)
        return
    a = a or batch.run()
    b = batch.run()
    batch.risk(batch.symmetric_kl(a.logits, b.logits), a, b)
