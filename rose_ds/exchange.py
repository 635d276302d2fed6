"""How ranks add up counts and sums: the only communication a threshold needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from rose_ds.core import threshold

Method = Literal["auto", "all_gather", "all_reduce"]
METHODS = ("auto", "all_gather", "all_reduce")

#: Up to this many ranks the histograms are gathered, which also tells how the kept parameters are spread over them;
#: beyond it a gathered histogram (32 KiB a rank) costs more than the sum.
GATHER_UP_TO = 16


class GroupExchange:
    """Exchange between the ranks of a process group: returns rows by rank (all_gather) or one summed row (all_reduce).

    Args:
        group: the ranks that hold different parts of the same tensors; never replicas.
        device: where the group's backend communicates.
        method: ``auto`` takes ROSE_DS_EXCHANGE from the environment if set, else all_gather up to 16 ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, method: Method = "auto") -> None:
        if method == "auto":
            method = os.environ.get("ROSE_DS_EXCHANGE", "auto")  # type: ignore[assignment]
        if method not in METHODS:
            raise ValueError(f"exchange method {method!r} (ROSE_DS_EXCHANGE) is not one of {list(METHODS)}")
        self.group, self.device, self.world_size = group, device, dist.get_world_size(group)
        small = self.world_size <= GATHER_UP_TO
        self.method = method if method != "auto" else "all_gather" if small else "all_reduce"

    def __call__(self, local: Tensor) -> Tensor:
        mine = local.to(self.device).contiguous()
        # A floating sum depends on its order: gathered and added in rank order it is the same bits on every rank.
        if self.method == "all_gather" or mine.is_floating_point():
            rows = [torch.empty_like(mine) for _ in range(self.world_size)]
            dist.all_gather(rows, mine, group=self.group)
            return torch.stack(rows)
        summed = mine.clone()
        dist.all_reduce(summed, group=self.group)
        return summed.unsqueeze(0)


class RankLost(RuntimeError):
    """Another rank did not take part in a collective: it died, or it made fewer steps."""


#: What gloo, its TCP transport and NCCL say of a rank that is not there; they have no exception type for it.
_SIGNS_OF_LOSS = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Timed out",
    "timed out",
    "timeout",
    "ncclRemoteError",
)


@contextmanager
def explaining_lost_ranks(doing: Callable[[], str]) -> Iterator[None]:
    """Turn the transport's error about a missing rank into RankLost, which says what that means for a training run."""
    try:
        yield
    except RuntimeError as error:
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        if alone or isinstance(error, RankLost) or not any(sign in str(error) for sign in _SIGNS_OF_LOSS):
            raise
        raise RankLost(
            f"another rank did not take part in {doing()}: it died (its own output or the launcher's says why) or its "
            "data loader ended earlier. Every rank must make the same number of backward() and step() calls: "
            "use a DistributedSampler (it evens them out), accelerate's even_batches=True, or drop_last=True on every "
            f"rank. The transport said: {error}"
        ) from error


def limit_waiting(timeout: timedelta) -> None:
    """Give every gloo group of this process the job's timeout.

    DeepSpeed makes groups of its own (deepspeed/utils/groups.py) without one, and theirs would be torch's half hour: so
    long would a rank wait for a host that is gone.
    """
    if not dist.is_initialized():
        return
    c10d = dist.distributed_c10d
    for group in list(c10d._world.pg_map):
        if dist.get_backend(group) == "gloo":
            c10d._set_pg_timeout(timeout, group)


def communication_device(group: dist.ProcessGroup | None) -> torch.device:
    """The device on which a group's backends communicate: an accelerator where they do there alone, or by NCCL. Of a
    group that was made without naming a backend, torch knows no name.
    """
    types = {device.type for device in (group or dist.group.WORLD)._device_types}  # type: ignore[union-attr]
    if "nccl" in str(dist.get_backend(group)) or "cpu" not in types:
        accelerator = next(iter(types - {"cpu"}))
        return torch.device(accelerator, torch.accelerator.current_device_index())
    return torch.device("cpu")


def group_exchange(group: dist.ProcessGroup | None, method: Method = "auto") -> threshold.Exchange:
    """The exchange between the ranks of ``group``; a single process exchanges nothing."""
    if not dist.is_initialized():
        return threshold.local_only
    return GroupExchange(group, communication_device(group), method)


def kth_smallest(
    chunks: Iterable[Tensor], k: int, group: dist.ProcessGroup | None = None, *, method: Method = "auto"
) -> Tensor:
    """The exact k-th smallest (1-based) of non-negative values spread over the ranks of ``group``.

    Bit for bit what ``torch.kthvalue`` gives on the gathered values, for three exchanged histograms of 32 KiB at most.
    A collective: every rank of the group must call it with the same ``k``.

    Args:
        chunks: this rank's values: floating tensors of any shape and number; none at all is fine. Read in fp32.
        k: 1 <= k <= number of values over all ranks.
        group: default: the world, or this process alone where torch.distributed is not initialised.

    Returns:
        fp32 scalar on the CPU, the same bits on every rank.

    Raises:
        ValueError: k out of range, or a value is negative or NaN; on every rank alike.
    """
    found = threshold.kth_smallest([(list(chunks), group_exchange(group, method))], k)
    if found.nan:
        raise ValueError(f"{found.nan} values are NaN")
    return torch.tensor(found.value, dtype=torch.float32)


def all_sum(values: Tensor) -> Tensor:
    """The sum over every rank of the job, fp64, on the CPU. A collective; alone, one's own values."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values.double().cpu()
    mine = values.double().to(communication_device(None))
    dist.all_reduce(mine)
    return mine.cpu()


def all_max(count: int) -> int:
    """The largest over every rank of the job. A collective; alone, one's own."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return count
    counts = torch.tensor([count], device=communication_device(None))
    dist.all_reduce(counts, op=dist.ReduceOp.MAX)
    return int(counts.item())


def all_agree(ok: bool) -> bool:
    """Whether every rank of the job says ``ok``. A collective; alone, one's own word."""
    return all_max(int(not ok)) == 0
