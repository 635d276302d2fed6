"""What a landscape or a line asks of a model, whether each rank holds it whole or all ranks hold it together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TypeVar

from torch import Tensor, nn

from rose_ds.analysis.directions import Weights, filter_normalised
from rose_ds.analysis.load import Batch, loss_and_accuracy
from rose_ds.experiments.resumable import rank_and_world

_Item = TypeVar("_Item")


class Movable(ABC):
    """A model in evaluation mode whose weights are moved."""

    @abstractmethod
    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """What of each parameter lies on this rank, to be written in place."""

    @abstractmethod
    def direction(self, seed: int) -> Weights:
        """See ``filter_normalised``; of what lies on this rank."""

    @abstractmethod
    def measure(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """Mean cross entropy and accuracy over rows, with the weights as they are now."""

    @abstractmethod
    def share(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """Which of the points this rank takes part in."""

    @abstractmethod
    def agreed(self, done: set[_Item]) -> set[_Item]:
        """Of the points that this rank's log has, those that need not be looked at again."""


class WholeModel(Movable):
    """A model that lies whole on each rank: the ranks share the points."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        return self.module.named_parameters()

    def direction(self, seed: int) -> Weights:
        return filter_normalised(self.module, seed)

    def measure(self, batches: Sequence[Batch]) -> tuple[float, float]:
        return loss_and_accuracy(self.module, batches)

    def share(self, items: Sequence[_Item]) -> Sequence[_Item]:
        rank, world = rank_and_world()
        return items[rank::world]

    def agreed(self, done: set[_Item]) -> set[_Item]:
        return done
