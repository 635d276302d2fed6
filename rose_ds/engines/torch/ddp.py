"""DistributedDataParallel: every rank holds every parameter, gradient and state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rose_ds.engines.base import Decision, Outcome
from rose_ds.engines.passes import Pull
from rose_ds.engines.torch.plain import PlainEngine, roots_of
from rose_ds.errors import RefusedConfiguration
from rose_ds.optimizer import RoseAdamW

_BUCKET = 25 * 2**20  # bytes of the gradient kept apart to an all-reduce: DDP's own default


class DdpEngine(PlainEngine):
    """DDP reduces during the last pull of a step alone, whatever the objective. What is kept apart is taken past DDP,
    whose hooks see one backward pass a graph, and reduced once a step, while the last pull runs where it is known by
    then."""

    name = "ddp"
    recovers = False

    def __init__(
        self,
        ddp: DistributedDataParallel,
        optimizer: RoseAdamW,
        accumulation_steps: int,
        max_grad_norm: float | None,
    ) -> None:
        _check(ddp)
        self.ddp = ddp
        # A loop that tells of one micro-batch to a step may make several, and enters no_sync() itself; the engine's own
        # count is set anew for each.
        self._counted_steps = accumulation_steps
        self._synced = self._syncs = True
        self._means: _Means | None = None
        """Of what is kept apart, under way in a step's last micro-batch."""
        super().__init__(ddp.module, optimizer, accumulation_steps, max_grad_norm)
        foreign = {p for g in optimizer.param_groups for p in g["params"]} - set(ddp.module.parameters())
        if foreign:
            raise RefusedConfiguration(
                f"the optimizer holds {len(foreign)} tensors that are not parameters of the DDP module, so nothing "
                "reduces their gradients: build RoseAdamW from the wrapped model's named_parameters()"
            )

    def ranks(self) -> int:
        return dist.get_world_size(self.ddp.process_group)

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        if self.ddp._join_config.enable:
            raise RefusedConfiguration(
                "DDP's join() lets a rank stop early, and the others would wait for its gradients and its counts: "
                "give every rank the same number of batches"
            )
        self._synced = self.ddp.require_backward_grad_sync
        wanted = min(self._counted_steps, self.accumulation_steps)
        self._syncs = self._synced and self._micro_batches + 1 >= wanted
        with self.ddp.no_sync():
            yield

    def pull(self, pulls: Sequence[Pull], *, more: bool) -> None:
        if self._syncs and not more:
            self._arm(roots_of(pulls)[0])
        super().pull(pulls, more=more)

    def pull_apart(self, pulls: Sequence[Pull]) -> None:
        early, self._means = self._means, None
        # Of a micro-batch that the loop synchronised and that was not the last, as under accelerate on one rank. The
        # mean of a mean is itself.
        if early is not None:
            self.add_risk_grads(early.wait())
        super().pull_apart(pulls)
        if self._syncs:
            self._means = _Means(super().take_risk_grads() or [], self.ddp.process_group)

    def check_sums(self) -> None:
        if self.ddp._comm_hooks:
            raise RefusedConfiguration(
                "a communication hook (register_comm_hook, PowerSGD) changes the gradients that DDP reduces, and this "
                "method compares them with one that is reduced as it is: leave the hook out, or choose "
                'first_order="exact" with objective task'
            )

    def _arm(self, roots: list[Tensor]) -> None:
        """What DDP's forward pass does outside no_sync() (torch/nn/parallel/distributed.py, _pre_forward and
        _post_forward): the next backward pass reduces, and the next forward pass broadcasts buffers."""
        self.ddp.reducer.prepare_for_forward()
        self.ddp.reducer.prepare_for_backward(roots if self.ddp.find_unused_parameters else [])
        self.ddp.require_forward_param_sync = True

    def count(self, *, last: bool) -> None:
        if last and not self._syncs:
            raise RefusedConfiguration(
                f"the last micro-batch of a step was number {self._micro_batches + 1} of prepare(accumulation_steps="
                f"{self._counted_steps}), or ran inside DDP's no_sync(), so its gradients were not reduced: make as "
                "many micro-batches to every step, and leave no_sync() for the last; where their number changes, call "
                "prepare() without accumulation_steps, divide the loss, and enter no_sync() for all but the last"
            )
        super().count(last=last)

    def step(self, decide: Decision) -> Outcome | None:
        if self._micro_batches + 1 >= self.accumulation_steps and not self._synced:
            raise RefusedConfiguration(
                "the last micro-batch of a step ran inside DDP's no_sync(), so its gradients were not reduced: leave "
                "no_sync() to rose_ds, and tell prepare() the accumulation_steps"
            )
        return super().step(decide)

    def take_risk_grads(self) -> list[Tensor] | None:
        means, self._means = self._means, None
        grads = super().take_risk_grads()
        if means is None and grads is not None:  # of earlier micro-batches alone
            means = _Means(grads, self.ddp.process_group)
        return None if means is None else means.wait()

    def forget_risk_grads(self) -> None:
        super().forget_risk_grads()
        self._means = None


class _Means:
    """Means over the ranks of 1-D tensors, which are not changed, as some may share memory; they are let go."""

    def __init__(self, tensors: list[Tensor], group: dist.ProcessGroup) -> None:
        self._ranks = dist.get_world_size(group)
        self._parts: list[tuple[Any, Tensor, list[int]]] = []
        for bucket in _buckets(tensors):
            flat = torch.cat(bucket)
            work = dist.all_reduce(flat, group=group, async_op=True)
            self._parts.append((work, flat, [t.numel() for t in bucket]))

    def wait(self) -> list[Tensor]:
        """The means, when all ranks' tensors have come."""
        means: list[Tensor] = []
        for work, flat, sizes in self._parts:
            work.wait()
            means += flat.div_(self._ranks).split(sizes)
        return means


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Takes them off the list, so that they need not be in memory together with what is made of them."""
    tensors.reverse()
    bucket: list[Tensor] = []
    size = 0
    while tensors:
        tensor = tensors.pop()
        if bucket and (size + tensor.nbytes > _BUCKET or tensor.device != bucket[0].device):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _check(ddp: DistributedDataParallel) -> None:
    ignored = [n for n, p in ddp.module.named_parameters() if p.requires_grad and n in ddp.parameters_to_ignore]
    for refused, message in (
        (
            ddp.static_graph,
            "DistributedDataParallel(static_graph=True) counts on one backward pass to a forward pass and reduces "
            "nothing else: use static_graph=False",
        ),
        (
            bool(getattr(ddp, "_use_python_reducer", False)),
            'torch._dynamo.config.optimize_ddp = "python_reducer" reduces outside the backward pass that rose_ds asks '
            "DDP to reduce in: set it to True or False before the model is wrapped",
        ),
        (
            ddp.mixed_precision is not None,
            "DistributedDataParallel(mixed_precision=...) swaps parameters for low-precision copies during a pass, "
            "which a second gradient would miss: use torch.autocast inside forward()",
        ),
        (
            bool(ignored),
            f"DDP ignores {ignored[:3]} (_ddp_params_and_buffers_to_ignore), so every rank would train its own copy: "
            "freeze them or let DDP reduce them",
        ),
    ):
        if refused:
            raise RefusedConfiguration(message)
