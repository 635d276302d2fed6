"""What FSDP1 and FSDP2 have in common: the optimizer holds shards, whose ``grad`` a backward pass fills in."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rose_ds.core.risk import squared_norms
from rose_ds.core.threshold import Exchange, local_only
from rose_ds.engines.base import Divergence, Forward, Loss, Losses, RefusedConfiguration
from rose_ds.engines.plain import PlainEngine
from rose_ds.exchange import group_exchange
from rose_ds.optimizer import RoseAdamW, Slice, local

#: The process groups over which a tensor is split, one for each mesh dimension that shards it; none: whole here.
Groups = tuple[dist.ProcessGroup, ...]


class Piece(NamedTuple):
    """What lies here of one named parameter."""

    name: str
    whole: nn.Parameter
    """Something of the whole parameter's shape, to count its elements."""
    param: nn.Parameter
    """The tensor of the model that holds it; the optimizer should hold the same."""
    offset: int
    numel: int
    groups: Groups


class ShardedEngine(PlainEngine):
    """Base of the engines for FSDP. Every rank lists every parameter, also one of which nothing lies here."""

    def __init__(
        self, module: nn.Module, optimizer: RoseAdamW, accumulation_steps: int, max_grad_norm: float | None
    ) -> None:
        self.pieces = self._find_pieces(module)
        self._params = list(dict.fromkeys(piece.param for piece in self.pieces if piece.param.requires_grad))
        self._exchanges: dict[tuple[str, ...], Exchange] = {}
        self._exchange_of: dict[Tensor, Exchange] = {
            piece.param: self._exchange_over(piece.groups) for piece in self.pieces
        }
        self._check_params(module, optimizer)
        super().__init__(module, optimizer, accumulation_steps, max_grad_norm)

    # --- what a version of FSDP answers ---

    @abstractmethod
    def _check_sync(self) -> None:
        """Raise RefusedConfiguration where a setting keeps the next backward pass from reducing its gradients."""

    @abstractmethod
    def _find_pieces(self, module: nn.Module) -> list[Piece]:
        """Every parameter that FSDP manages, in the model's order."""

    @abstractmethod
    def _two_gradients(self, forward: Forward, loss: Loss, divergence: Divergence) -> Losses:
        """Leave the task gradient in ``grad``; ``_take_kl_gradient()`` in between."""

    # --- shared ---

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(piece.name, piece.whole) for piece in self.pieces]

    def _find_slices(self, index: dict[str, int]) -> tuple[list[Slice], list[Exchange], list[Exchange]]:
        held = {p for group in self.optimizer.param_groups for p in group["params"]}
        eligible = [piece for piece in self.pieces if piece.name in index and piece.param in held]
        here = [piece for piece in eligible if piece.numel]
        slices = [Slice(p.name, index[p.name], p.param, p.offset, p.numel) for p in here]
        exchanges = dict.fromkeys(self._exchange_of[p.param] for p in eligible)
        return slices, [self._exchange_of[p.param] for p in here], list(exchanges) or [local_only]

    def _exchange_over(self, groups: Groups) -> Exchange:
        key = tuple(group.group_name for group in groups)
        if key not in self._exchanges:
            steps = [group_exchange(group) for group in groups]
            self._exchanges[key] = steps[0] if len(steps) == 1 else Composed(steps) if steps else local_only
        return self._exchanges[key]

    def _check_params(self, module: nn.Module, optimizer: RoseAdamW) -> None:
        managed = {piece.param for piece in self.pieces}
        outside = [name for name, p in module.named_parameters() if p.requires_grad and p not in managed]
        if outside:
            raise RefusedConfiguration(
                f"FSDP does not manage {outside[:3]} (ignored parameters?), so nothing reduces their gradients and "
                "every rank would train its own copy: shard the whole model, or freeze them"
            )
        strangers = {p for group in optimizer.param_groups for p in group["params"]} - managed
        if strangers:
            raise RefusedConfiguration(
                f"the optimizer holds {len(strangers)} tensors that are not parameters of the sharded model, which "
                "would never be updated: build RoseAdamW after sharding, from the sharded model's named_parameters()"
            )

    def backward(self, forward: Forward, loss: Loss, divergence: Divergence | None) -> Losses:
        self._check_sync()
        with self._added_to_earlier_grads():
            if divergence is not None:
                return self._two_gradients(forward, loss, divergence)
            return self._task_gradient(forward(), loss)

    def _task_gradient(self, logits: Tensor, loss: Loss) -> Losses:
        value = loss(logits)
        (value / self.accumulation_steps).backward()
        return Losses(value.detach(), None)

    def _take_kl_gradient(self) -> None:
        """Move what a backward pass left in ``grad`` to where the KL gradient is kept."""
        self.add_kl_grads(self.slice_grads())
        for param in self._params:
            param.grad = None

    @contextmanager
    def _added_to_earlier_grads(self) -> Iterator[None]:
        """Hide earlier micro-batches' gradients from both backward passes, then add them to what these leave.

        FSDP would accumulate by itself, but into one buffer for both gradients.
        """
        earlier = [(param, param.grad) for param in self._params]
        for param in self._params:
            param.grad = None
        try:
            yield
        except BaseException:
            for param, grad in earlier:  # whatever lies there now may be the KL gradient
                param.grad = grad
            raise
        for param, grad in earlier:
            if param.grad is None:
                param.grad = grad
            elif grad is not None:
                local(param.grad).add_(local(grad))

    def _clip(self, params: list[Tensor]) -> float:
        # not torch's: over several meshes its norm of DTensors is an error, and of plain shards this rank's own
        squares = 0.0
        for exchange in self._exchanges.values():
            mine = [local(p.grad) for p in params if p.grad is not None and self._exchange_of[p] is exchange]
            squares += exchange(squared_norms(mine, [0] * len(mine), 1)).sum().item()
        norm = math.sqrt(squares)
        if self.max_grad_norm:
            grads = [local(p.grad) for p in params if p.grad is not None]
            if grads:
                torch._foreach_mul_(grads, min(1.0, self.max_grad_norm / (norm + 1e-6)))
        return norm


class Composed:
    """Exchange over one group after the other, for a tensor that several mesh dimensions split: one row a rank."""

    def __init__(self, steps: Sequence[Exchange]) -> None:
        self.steps = steps

    def __call__(self, local: Tensor) -> Tensor:
        rows = local.unsqueeze(0)
        for exchange in self.steps:
            rows = exchange(rows).flatten(0, 1)
        return rows
