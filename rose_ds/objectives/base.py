"""What an objective is, and what it is given."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Generator, Tensor

#: Makes a pass's shift of the input embeddings once their shape is known. Takes which tokens are real (batch, length;
#: bool), the embeddings' shape (batch, length, dim) and a generator of its own; returns fp32 of that shape.
Start = Callable[[Tensor, tuple[int, ...], Generator], Tensor]


class Comparing(Protocol):
    """How two predictions of a micro-batch are compared."""

    def symmetric_kl(
        self, logits_a: Tensor, logits_b: Tensor, *, reduction: str = "mean", fixed_targets: bool = False
    ) -> Tensor:
        """Divergence of two predictions (Eq. 1), over what counts as one: mean, or sum, over the batch. With
        ``fixed_targets`` either direction moves its second argument alone.
        """

    def summed_kl(self, logits: Tensor, target: Tensor) -> Tensor:
        """``KL(prediction || target)``, summed over the batch."""


class RowComparing(Comparing, Protocol):
    """The same, of all rows or of some."""

    def disagreement(self, logits_a: Tensor, logits_b: Tensor) -> Tensor:
        """Fraction of the batch for which two predictions give two answers (Table 4)."""

    def of_rows(self, rows: Tensor, batch: int | None = None) -> RowComparing:
        """The comparison of these rows of the batch alone: their positions, int64."""


class MicroBatch(Comparing, Protocol):
    """This rank's micro-batch, and all that an objective knows of the model."""

    def run(self, shift: Tensor | Start | None = None, like: Any = None) -> Any:
        """One forward pass, cut at its outputs; ``like``: with the random numbers (dropout masks) of that pass.

        It has ``logits``, an fp32 leaf, (batch, ..., classes), and ``shift``, what was added to the input embeddings:
        None, or an fp32 leaf, (batch, length, dim), whose ``grad`` is there after a backward.
        """

    def loss(self, p: Any) -> Tensor:
        """The task loss of a pass, fp32 scalar. To be asked for before another pass is run."""

    def probe(self, shift: Tensor | Start, value: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The shift, and the gradient of ``value(logits)`` with respect to it; nothing else is differentiated."""

    def backward(self, value: Tensor, *passes: Any, more: bool = False) -> None:
        """Train on the gradient of ``value``, a function of the passes' outputs; ``more``: it is not the last."""

    @property
    def wants_risk(self) -> bool:
        """Whether a mask ranks the gradient of a divergence between two passes (first-order risk)."""

    def risk(self, value: Tensor, *passes: Any, share: float = 0.0) -> None:
        """Rank the gradient of ``value``; a no-op unless a mask needs it.

        ``share``: how much of it ``backward()`` contains, which second-order risk takes out of the task gradient.
        """

    @property
    def one_sided(self) -> bool:
        """Whether that risk is to be a fast one."""

    def one_sided_risk(self, a: Any = None) -> None:
        """Rank the gradient, through a pass of its own alone, of its divergence from ``a`` (or from one without graph).

        Two dropout passes are exchangeable, so this is half of the whole gradient in expectation; nothing looks at the
        scale of a risk.
        """

    def agree(self, ok: bool) -> bool:
        """Whether all ranks say ``ok``."""

    def average_logits(self) -> Tensor:
        """Logits under the averaged weights, without a graph. To be asked for before any pass is run."""


@dataclass(frozen=True)
class Objective(ABC):
    """A frozen dataclass of constants. Calling it trains on one micro-batch; returns the detached value minimised."""

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, batch: MicroBatch) -> Tensor: ...

    def record(self) -> dict[str, Any]:
        """Name and constants, as ``rose_ds.objectives.resolve`` reads them."""
        return {"name": self.name, **asdict(self)}

    @property
    def compares(self) -> bool:
        """Whether it looks at logits, and not at losses alone."""
        return True

    @property
    def trains_on_risk(self) -> bool:
        """Whether the divergence that first-order risk is the gradient of is part of what it minimises."""
        return False

    @property
    def shifts(self) -> bool:
        """Whether passes with shifted input embeddings are run."""
        return False

    def average_decay(self, step: int) -> float | None:
        """Decay of the moving average of the weights after optimizer step ``step`` (from 1); None: no average."""
        return None


def normal_noise(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Standard normal, on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device)


def uniform_noise(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Uniform in [0, 1), on the generator's device."""
    return torch.rand(shape, generator=generator, device=generator.device)


def constant(default: Any, help: str) -> Any:
    """A field of an objective, with the text of its flag."""
    return field(default=default, metadata={"help": help})


def check_number(name: str, value: Any, *, above_zero: bool = False) -> None:
    """Raise TypeError or ValueError unless ``value`` is a finite number >= 0 (> 0)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} must be a number")
    if not 0 <= value < math.inf or (above_zero and value == 0):
        raise ValueError(f"{name}={value!r} must be finite and {'> 0' if above_zero else '>= 0'}")


def check_count(name: str, value: Any, low: int = 1) -> None:
    """Raise ValueError unless ``value`` is an integer >= ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}={value!r} must be an integer >= {low}")
