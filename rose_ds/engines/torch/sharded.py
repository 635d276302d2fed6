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

from rose_ds.core.layout import Block
from rose_ds.core.risk import squared_norms
from rose_ds.core.threshold import Exchange, local_only
from rose_ds.engines.passes import Pull
from rose_ds.engines.torch.plain import TorchEngine
from rose_ds.errors import RefusedConfiguration
from rose_ds.exchange import group_exchange
from rose_ds.optimizer import RoseAdamW, Slice, local

#: The process groups over which a tensor is split, one for each mesh dimension that shards it; none: whole here.
ProcessGroups = tuple[dist.ProcessGroup, ...]


class Managed(NamedTuple):
    """A named parameter that FSDP manages, and what of it lies here."""

    name: str
    whole: nn.Parameter
    """Something of the whole parameter's shape, to count its elements."""
    param: nn.Parameter
    """The tensor of the model that holds it; the optimizer should hold the same."""
    offset: int
    block: Block
    """Nothing lies here where it has no element."""
    groups: ProcessGroups


def refuse_fp16_reduction(dtype: torch.dtype | None) -> None:
    """Of a part of the model, the type that its gradients are reduced in."""
    if dtype == torch.float16:
        raise RefusedConfiguration(
            "FSDP's mixed precision with reduce_dtype=torch.float16, or with param_dtype=torch.float16 and no "
            "other, reduces gradients that no loss scale keeps from becoming zero: use torch.bfloat16 or torch.float32"
        )


class ShardedEngine(TorchEngine):
    """Base of the engines for FSDP. Every rank lists every parameter, also one of which nothing lies here.

    Passes are pulled back one by one: a backward pass through two at once would hold every parameter's whole gradient
    of the first until that of the second is there.
    """

    def __init__(
        self, module: nn.Module, optimizer: RoseAdamW, accumulation_steps: int, max_grad_norm: float | None
    ) -> None:
        self.managed = self._find_managed(module)
        self._params = list(dict.fromkeys(m.param for m in self.managed if m.param.requires_grad))
        self._exchanges: dict[tuple[str, ...], Exchange] = {}
        self._exchange_of: dict[Tensor, Exchange] = {m.param: self._exchange_over(m.groups) for m in self.managed}
        self._check_params(module, optimizer)
        super().__init__(module, optimizer, accumulation_steps, max_grad_norm)

    # --- what a version of FSDP answers ---

    @abstractmethod
    def _check_sync(self) -> None:
        """Raise RefusedConfiguration where a setting keeps the next backward pass from reducing its gradients."""

    @abstractmethod
    def _find_managed(self, module: nn.Module) -> list[Managed]:
        """Every parameter that FSDP manages, in the model's order."""

    # --- shared ---

    def _what_is_trainable(self) -> tuple[list[tuple[int, bool]], list[int]]:
        for m in self.managed:  # what stands for the whole parameter may be another tensor
            if m.whole.requires_grad != m.param.requires_grad:
                m.whole.requires_grad_(m.param.requires_grad)
        return super()._what_is_trainable()

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(m.name, m.whole) for m in self.managed]

    def find_slices(self, names: Sequence[str]) -> tuple[list[Slice], list[Exchange], list[Exchange]]:
        held = {p for group in self.optimizer.param_groups for p in group["params"]}
        index = {name: i for i, name in enumerate(names)}
        wanted = [m for m in self.managed if m.name in index and m.param in held]
        here = [m for m in wanted if m.block.numel]
        slices = [Slice(m.name, index[m.name], m.param, m.offset, m.block.numel, m.block) for m in here]
        exchanges = dict.fromkeys(self._exchange_of[m.param] for m in wanted)
        return slices, [self._exchange_of[m.param] for m in here], list(exchanges) or [local_only]

    def _exchange_over(self, groups: ProcessGroups) -> Exchange:
        key = tuple(group.group_name for group in groups)
        if key not in self._exchanges:
            steps = [group_exchange(group) for group in groups]
            self._exchanges[key] = steps[0] if len(steps) == 1 else Composed(steps) if steps else local_only
        return self._exchanges[key]

    def _check_params(self, module: nn.Module, optimizer: RoseAdamW) -> None:
        managed = {m.param for m in self.managed}
        outside = [name for name, p in module.named_parameters() if p.requires_grad and p not in managed]
        if outside:
            raise RefusedConfiguration(
                f"FSDP does not manage {outside[:3]} (ignored parameters?), so nothing reduces their gradients and "
                "every rank would train its own copy: shard the whole model, or freeze them"
            )
        foreign = {p for group in optimizer.param_groups for p in group["params"]} - managed
        if foreign:
            raise RefusedConfiguration(
                f"the optimizer holds {len(foreign)} tensors that are not parameters of the sharded model, which "
                "would never be updated: build RoseAdamW after sharding, from the sharded model's named_parameters()"
            )

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        self._check_sync()
        with self._added_to_earlier_grads():
            yield

    def pull(self, pulls: Sequence[Pull], *, more: bool) -> None:
        for pull in self._in_order(pulls):
            self._backward(pull, retain_graph=False)

    def pull_apart(self, pulls: Sequence[Pull]) -> None:
        for pull in self._in_order(pulls):
            with self._added_to_earlier_grads():
                self._backward(pull, retain_graph=self.retains_graphs)
                self.add_risk_grads(self.slice_grads())
                for param in self._params:
                    param.grad = None

    def _in_order(self, pulls: Sequence[Pull]) -> list[Pull]:
        """The pass whose graph waits first, where there is but one; else the last pass first."""
        return sorted(reversed(pulls), key=lambda pull: pull.p is not self.graph_of)

    def _backward(self, pull: Pull, *, retain_graph: bool) -> None:
        roots, cotangents = pull.roots()
        pull.p.rearm()
        torch.autograd.backward(roots, cotangents, retain_graph=retain_graph)
        self.graph_of = None

    @contextmanager
    def _added_to_earlier_grads(self) -> Iterator[None]:
        """Hide gradients that wait for the step from the passes inside, then add them to what these leave.

        FSDP would accumulate by itself, but into one buffer for the gradient that trains and the one kept apart.
        """
        earlier = [(param, param.grad) for param in self._params]
        for param in self._params:
            param.grad = None
        try:
            yield
        except BaseException:
            for param, grad in earlier:  # whatever lies there now may be the gradient kept apart
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
