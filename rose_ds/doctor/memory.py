"""How much memory a model's training takes on a rank, and how much disk its checkpoints, before either is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rose_ds.doctor.finding import Finding

GIB = 2**30
#: Above this share of what is free, activations may no longer fit.
_TIGHT = 0.8


@dataclass(frozen=True)
class Plan:
    """How a model is going to be trained."""

    stage: int
    """ZeRO stage; 0 also for one process and DDP, 3 also for FSDP."""
    ranks: int
    half: bool
    """In bf16 or fp16. DeepSpeed keeps the weights in it, and fp32 masters; all others keep fp32 weights alone."""
    deepspeed: bool = True
    masks: bool = True
    risks: int = 1
    """fp32 values kept for each eligible element: of a second gradient that is ranked, of an average of risks."""
    offload_optimizer: bool = False
    offload_parameters: bool = False


@dataclass(frozen=True)
class Estimate:
    """Bytes on a rank, by what they are for."""

    on_device: Mapping[str, int]
    on_host: Mapping[str, int]

    @property
    def device_bytes(self) -> int:
        """On the accelerator, or on a CPU rank all that is not offloaded."""
        return sum(self.on_device.values())

    @property
    def host_bytes(self) -> int:
        """Offloaded to host memory."""
        return sum(self.on_host.values())


def estimate(parameters: int, eligible: int, plan: Plan) -> Estimate:
    """Memory of a rank at the step, where it is highest; activations and gathered layers come on top.

    Args:
        parameters: elements of the whole model.
        eligible: how many of them may be masked.
        plan: how it is trained.
    """
    part = math.ceil(parameters / plan.ranks) if plan.stage >= 1 else parameters
    eligible_part = math.ceil(eligible / plan.ranks) if plan.stage >= 1 else eligible
    stored = 2 if plan.half and plan.deepspeed else 4
    # DeepSpeed keeps a flat fp32 copy in fp32 training too
    masters = plan.deepspeed and (plan.half or plan.stage >= 1)
    # gradient_as_bucket_view=False, the default of DDP and of accelerate: what is reduced is a copy
    buckets = plan.ranks > 1 and plan.stage == 0 and not plan.deepspeed
    weights = {"weights": stored * (part if plan.stage == 3 else parameters)}
    gradients = {
        "gradients": stored * (part if plan.stage >= 2 else parameters),
        "DDP's buckets": 4 * parameters * buckets,
    }
    states = {
        "fp32 masters": 4 * part * masters,
        "AdamW's states": 8 * part,
        "the fp32 gradient of a step": 4 * part * masters,
        "masks": eligible_part * plan.masks,
        "first-order risk": 4 * eligible_part * plan.risks,
    }
    # A partition of the gradient lies where the optimizer does (deepspeed/runtime/zero/stage3.py,
    # grad_partitions_flat_buffer; stage_1_and_2.py, copy_grads_in_partition). Before stage 2 it is whole on the device.
    follow = plan.offload_optimizer and plan.stage >= 2
    device: dict[str, int] = {}
    host: dict[str, int] = {}
    for group, offloaded in ((weights, plan.offload_parameters), (gradients, follow), (states, plan.offload_optimizer)):
        (host if offloaded else device).update({what: size for what, size in group.items() if size})
    return Estimate(device, host)


def checkpoint_bytes(parameters: int, half: bool) -> int:
    """A checkpoint of the whole job, at most: the engine's weights and those to be loaded by name, fp32 masters and
    AdamW's two states.
    """
    return parameters * (12 + 2 * (2 if half else 4))


@dataclass(frozen=True)
class Machine:
    """What a host has for its ranks."""

    ranks: int
    """Of the job, on this host."""
    host_free: int
    """Bytes of memory that all processes of the host can still get."""
    device_free: int | None
    """Bytes free on this rank's accelerator; None where it trains on the CPU."""


def machine(ranks: int, local_rank: int) -> Machine:
    """This host now, within the limit of its container."""
    device_free = None
    if torch.cuda.is_available() and local_rank < torch.cuda.device_count():
        device_free = torch.cuda.mem_get_info(local_rank)[0]
    return Machine(ranks, min(_memory_available(), _container_limit()), device_free)


def _memory_available() -> int:
    import psutil  # accelerate and deepspeed need it too

    return int(psutil.virtual_memory().available)


#: What a control group's files are called: limit, use, and of its statistics what the kernel gives back when it must.
_CGROUPS = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _container_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes left to this process by the limits of its control groups (a container's, a Slurm job's), those around them
    included; a very large number where there is none.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    groups = [(2, root, "/"), (1, root / "memory", "/")]  # a container may see its own as the root, by another path
    groups += [(2, root, path) for number, kinds, path in lines if (number, kinds) == ("0", "")]
    groups += [(1, root / "memory", path) for _, kinds, path in lines if "memory" in kinds.split(",")]
    left = [2**63]
    for version, top, path in groups:
        inner = top / path.strip("/")
        around = [inner, *inner.parents]
        left += [_left_in(folder, *_CGROUPS[version]) for folder in around[: around.index(top) + 1]]
    return min(left)


def _left_in(folder: Path, limit: str, current: str, reclaimed: str) -> int:
    try:
        most, used = int((folder / limit).read_text()), int((folder / current).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return most - used + int(statistics.get(reclaimed, 0))
    except (OSError, ValueError):  # no such group, or "max"
        return 2**63


def shortage(needed: Estimate, there: Machine) -> float:
    """Needed over free memory, of the device or the host, whichever is worse; above 1 it does not fit."""
    if there.device_free is None:
        return (needed.device_bytes + needed.host_bytes) * there.ranks / max(there.host_free, 1)
    on_host = needed.host_bytes * there.ranks / max(there.host_free, 1)
    return max(needed.device_bytes / max(there.device_free, 1), on_host)


def check_memory(parameters: int, eligible: int, plans: Sequence[Plan], there: Machine) -> list[Finding]:
    """Compare what a rank needs with what its host has.

    Args:
        parameters: elements of the model.
        eligible: how many of them may be masked.
        plans: the one that a config says, or all those that a launcher may choose among.
        there: the host.
    """
    free = f"{there.host_free / GIB:.1f} GiB of host memory free for {there.ranks} rank{'s' * (there.ranks > 1)}"
    if there.device_free is not None:
        free = f"{there.device_free / GIB:.1f} GiB free on the GPU, {free}"
    estimates = {_name(plan): estimate(parameters, eligible, plan) for plan in plans}
    ratios = {name: shortage(needed, there) for name, needed in estimates.items()}
    if len(plans) == 1:
        told = [_spelled(estimates[_name(plans[0])])]
    else:
        told = [f"{name} {(e.device_bytes + e.host_bytes) / GIB:.2f} GiB" for name, e in estimates.items()]
    text = (
        f"{parameters:,} parameters, {eligible:,} eligible; a rank needs beside activations {', '.join(told)}; {free}"
    )
    fit = [name for name, ratio in ratios.items() if ratio <= _TIGHT]
    if len(fit) == len(plans):
        return [Finding("memory", "ok", text)]
    if fit:
        return [Finding("memory", "warning", text, f"what fits with room for activations: {', '.join(fit)}")]
    nearest = min(plans, key=lambda plan: ratios[_name(plan)])
    worst, mend = ratios[_name(nearest)], _ways_out(nearest, estimates[_name(nearest)], there)
    if worst <= 1:
        return [Finding("memory", "warning", f"{text}: activations may not fit beside it", mend)]
    return [Finding("memory", "failed", f"{text}: {worst:.1f} times what is free", mend)]


def _ways_out(plan: Plan, needed: Estimate, there: Machine) -> str:
    """What makes it less, of what the plan has not got yet."""
    # offload only moves to the host: it helps where the GPU is what is short of memory
    full = there.device_free is not None and needed.device_bytes > _TIGHT * there.device_free
    ways = {
        "a higher ZeRO stage": plan.stage < 3,
        "more ranks": True,
        "bf16": not plan.half,
        "offload_optimizer (ds_configs/zero2_offload.json)": full and not plan.offload_optimizer,
        "offload_param (ds_configs/zero3_offload.json)": full and not plan.offload_parameters,
    }
    return f"{', '.join(way for way, left in ways.items() if left)}, or a smaller model"


def _name(plan: Plan) -> str:
    if plan.ranks == 1:
        return "one rank"
    return f"ZeRO-{plan.stage}" if plan.deepspeed else "FSDP" if plan.stage == 3 else "DDP"


def _spelled(needed: Estimate) -> str:
    parts = [f"{what} {size / GIB:.2f}" for what, size in needed.on_device.items()]
    parts += [f"{what} {size / GIB:.2f} (host)" for what, size in needed.on_host.items()]
    return f"{(needed.device_bytes + needed.host_bytes) / GIB:.2f} GiB: {', '.join(parts)}"


def ranks_on_host(environment: Mapping[str, str], world_size: int) -> int:
    """How many of the job's ranks are on this host, as torchrun or deepspeed say; else one a GPU, at least one."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return min(world_size, max(torch.cuda.device_count(), 1))


def local_rank(environment: Mapping[str, str]) -> int:
    """Of this process; 0 without a launcher."""
    given = environment.get("LOCAL_RANK", "0")
    return int(given) if given.isdigit() else 0
