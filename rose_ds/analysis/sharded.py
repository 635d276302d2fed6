"""A model that no rank holds whole: each moves its own slices, and all run the forward passes together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import rose_ds
from rose_ds.analysis.directions import Weights, drawn_for, filter_lengths, filtered_by_column
from rose_ds.analysis.load import Batch, loss_and_right
from rose_ds.analysis.movable import Movable, WholeModel
from rose_ds.engines.base import Engine
from rose_ds.engines.registry import engine_for
from rose_ds.exchange import group_exchange
from rose_ds.hardware import default_device

_Item = TypeVar("_Item")


def start_ranks(engine: str) -> None:
    """Take this rank's accelerator and, if ``engine`` is one of SHARDINGS, join the launcher's process group.

    Raises:
        ValueError: there is no launcher.
    """
    device = default_device()
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)
    if engine not in SHARDINGS:
        return
    if "RANK" not in os.environ:
        raise ValueError(
            f"engine={engine!r} shards a model over ranks: start it with torchrun --nproc_per_node N -m rose_ds, or "
            "deepspeed --module rose_ds; without --engine one process holds the whole model"
        )
    if not dist.is_initialized():
        own = torch.accelerator.current_accelerator(check_available=True)
        more = "" if own is None else f",{own.type}:{dist.get_default_backend_for_device(own)}"
        dist.init_process_group(f"cpu:gloo{more}")


class ShardedModel(Movable):
    """A classifier under an engine that splits each parameter over all ranks, in fp32.

    Args:
        engine: with an optimizer that holds every parameter.
        forward: runs the model; a collective.
    """

    def __init__(self, engine: Engine, forward: Callable[..., Any]) -> None:
        self.engine, self._forward = engine, forward
        self._exchange = group_exchange(None)
        self._slices = {piece.name: piece for piece in engine.trainable_slices()}
        self._by_column = filtered_by_column(engine.module)
        self._shapes = {name: engine.shape(param) for name, param in engine.named_parameters()}

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        return ((name, piece.view(piece.param)) for name, piece in self._slices.items())

    def direction(self, seed: int) -> Weights:
        """A collective: a filter's length is that of all its parts."""
        found = {name: torch.zeros_like(weights) for name, weights in self.named_parameters()}
        for name, shape in self._shapes.items():  # every rank, also one that has nothing of this parameter
            if len(shape) < 2:
                continue
            width, by_column = shape[1:].numel(), name in self._by_column
            squares = torch.zeros(shape[1 if by_column else 0], dtype=torch.float64)
            piece = self._slices.get(name)
            if piece is not None:
                positions = piece.block.positions()
                filters = positions % width if by_column else positions // width
                squares.index_add_(0, filters, piece.view(piece.param).double().square().cpu())
            lengths = self._exchange(squares).sum(0).sqrt().float().cpu()
            if piece is not None:
                drawn = drawn_for(name, shape, seed)  # whole, so that it does not depend on who holds what
                scale = lengths / filter_lengths(drawn, by_column=by_column).clamp_min(1e-12)
                found[name].copy_(drawn.view(-1)[positions] * scale[filters])
        return found

    @torch.no_grad()
    def measure(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """The batches are dealt out to the ranks. A collective."""
        self.engine.publish()
        rank, world = dist.get_rank(), dist.get_world_size()
        sums = torch.zeros(3, dtype=torch.float64)
        for start in range(0, len(batches), world):
            at = start + rank
            batch = batches[min(at, len(batches) - 1)]  # a pass gathers weights from every rank: all make as many
            loss, right = loss_and_right(self._forward, batch)
            if at < len(batches):
                sums += torch.tensor([loss, right, len(batch["labels"])], dtype=torch.float64)
        self.engine.settle()
        loss, right, count = self._exchange(sums).sum(0).tolist()
        return loss / count, right / count

    def share(self, items: Sequence[_Item]) -> Sequence[_Item]:
        return items

    def agreed(self, done: set[_Item]) -> set[_Item]:
        """Those that every rank has: a kill may have left one rank's log a point behind. A collective."""
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, done)
        return set.intersection(*everywhere)


@contextmanager
def placed(model: nn.Module, engine: str, device: torch.device) -> Iterator[Movable]:
    """``model`` as it is, or sharded where ``engine`` is one of SHARDINGS."""
    if engine in SHARDINGS:
        with sharded(model, engine, device) as parts:
            yield parts
    else:
        yield WholeModel(model)


@contextmanager
def sharded(model: nn.Module, engine: str, device: torch.device) -> Iterator[ShardedModel]:
    """``model`` split over all ranks, which is of no other use from then on. A collective.

    Args:
        model: whole on every rank, best on the CPU.
        engine: a key of SHARDINGS.
        device: where the slices go.
    """
    with SHARDINGS[engine](model.float().eval().requires_grad_(True), device) as parts:
        yield parts


@contextmanager
def _fsdp2(model: nn.Module, device: torch.device) -> Iterator[ShardedModel]:
    from rose_ds.engines.torch.fsdp2 import shard_by_layer

    shard_by_layer(model, device)
    optimizer = rose_ds.RoseAdamW(model.named_parameters(), strategy="none")
    yield ShardedModel(engine_for(model, optimizer, 1, None), model)


@contextmanager
def _zero3(model: nn.Module, device: torch.device) -> Iterator[ShardedModel]:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "RoseAdamW", "params": {"strategy": "none"}},
        # no parameter stays whole: not a small one, and none that will be used again soon
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0},
    }
    deepspeed.init_distributed(dist_init_required=False)
    ds, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    ds.eval()
    try:
        yield ShardedModel(engine_for(ds, None, 1, None), ds)
    finally:
        ds.destroy()


#: By the engine's name.
SHARDINGS: dict[str, Callable[[nn.Module, torch.device], AbstractContextManager[ShardedModel]]] = {
    "fsdp2": _fsdp2,
    "zero3": _zero3,
}
