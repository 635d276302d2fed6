"""The ranks of a job: whether all come, add up right, and agree on one threshold."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rose_ds.doctor.finding import Finding
from rose_ds.exchange import communication_device, kth_smallest

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FLOATS = 1 << 20
_VALUES = 1_000_000
INTERFACE = (
    "if a host has several networks, or its name resolves to 127.0.0.1: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME "
    "to the interface between the hosts (ip -br addr), on every host"
)


@dataclass(frozen=True)
class Launch:
    """What a launcher has told this process."""

    rank: int
    world_size: int
    address: str
    port: int
    agent_store: bool
    """Whether torchrun's agent, and not rank 0, serves the store at this address."""


def launch_from(environment: Mapping[str, str]) -> tuple[Launch | None, list[Finding]]:
    """What a launcher has set; None where there is none, or not all of it.

    Args:
        environment: of the process.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        tasks = environment.get("SLURM_NTASKS", "1")
        if tasks.isdigit() and int(tasks) > 1 and "SLURM_PROCID" in environment:
            text = f"Slurm started {tasks} tasks, and each is a job of its own: Slurm sets no RANK"
            mend = "start one task a node, and torchrun or launch/train.py's launcher in it, as launch/slurm/ does"
            return None, [Finding("launcher", "failed", text, mend)]
        text = "none: one process, so nothing between ranks was checked"
        return None, [Finding("launcher", "ok", text, "torchrun --nproc_per_node 2 -m rose_ds doctor")]
    missing = [name for name in _VARIABLES if not environment.get(name)]
    numbers = {name: environment.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    wrong = [f"{name}={value!r}" for name, value in numbers.items() if name not in missing and not value.isdigit()]
    if missing or wrong:
        text = f"set half-way: {' '.join([f'{name} is missing' for name in missing] + wrong)}"
        return None, [Finding("launcher", "failed", text, "start through torchrun, accelerate launch or deepspeed")]
    launch = Launch(
        int(numbers["RANK"]),
        int(numbers["WORLD_SIZE"]),
        environment["MASTER_ADDR"],
        int(numbers["MASTER_PORT"]),
        environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )
    where = f"{launch.world_size} ranks, {launch.address}:{launch.port}"
    return launch, [Finding("launcher", "ok", where)]


def join(launch: Launch, seconds: float) -> Finding:
    """Wait for every rank and start a gloo process group. Never waits longer than about twice ``seconds``.

    Returns:
        ok: torch.distributed is initialised. failed: it is not, and the text names the ranks that are missing.
    """
    timeout, check = timedelta(seconds=seconds), "ranks"
    address = f"MASTER_ADDR:MASTER_PORT {launch.address}:{launch.port}"
    try:
        server = launch.rank == 0 and not launch.agent_store
        store: Any = dist.TCPStore(  # type: ignore[attr-defined]
            launch.address, launch.port, launch.world_size, server, timeout, wait_for_workers=False
        )
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"rose_ds/doctor/{restart}", store)  # type: ignore[attr-defined]
        absent, hosts = _roll_call(store, launch, seconds)
    except (RuntimeError, ValueError, OSError) as error:
        text = f"rank {launch.rank} on {platform.node()} cannot reach {address}: {first_line(error)}"
        mend = (
            "rank 0's host must listen there, the name must resolve to it on every host, and the port must be open "
            "between hosts and free on rank 0's (--master_port, --main_process_port; torchrun with a rendezvous takes "
            "rank 0's host name and any free port: PET_LOCAL_ADDR=ADDRESS on every host names the right network)"
        )
        return Finding(check, "failed", text, mend)
    if absent:
        there = ", ".join(f"{rank} ({host})" for rank, host in hosts.items())
        text = (
            f"{len(absent)} of {launch.world_size} did not come within {seconds:g} s: {_listed(absent)}; there: {there}"
        )
        mend = f"look at their output; every host must start with the same WORLD_SIZE and reach {address}"
        return Finding(check, "failed", text, mend)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("gloo", store),  # type: ignore[attr-defined]
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
        )
    except RuntimeError as error:
        text = f"all reach {address}, but not each other: {first_line(error)}"
        return Finding(check, "failed", text, INTERFACE)
    return Finding(check, "ok", f"all {launch.world_size} reach each other")


def _roll_call(store: Any, launch: Launch, seconds: float) -> tuple[list[int], dict[int, str]]:
    """The ranks that did not come, and the hosts of those that did; rank 0 decides, the others hear of it."""
    names = {rank: f"host/{rank}" for rank in range(launch.world_size)}
    store.set(names[launch.rank], platform.node())
    if launch.rank == 0:
        try:
            store.wait(list(names.values()), timedelta(seconds=seconds))
            absent: list[int] = []
        except RuntimeError:
            absent = [rank for rank, name in names.items() if not store.check([name])]
        hosts = {rank: store.get(name).decode() for rank, name in names.items() if rank not in absent}
        store.set("outcome", json.dumps([absent, hosts]))
    # rank 0 may have begun to wait later than this one
    store.wait(["outcome"], timedelta(seconds=2 * seconds))
    absent, by_name = json.loads(store.get("outcome"))
    if absent:  # rank 0 serves the store: it stays until all have heard
        told, deadline = store.add("told", 1), time.monotonic() + 5
        while launch.rank == 0 and told < launch.world_size - len(absent) and time.monotonic() < deadline:
            time.sleep(0.05)
            told = store.add("told", 0)
    return absent, {int(rank): host for rank, host in by_name.items()}


def check_all_reduce(group: dist.ProcessGroup | None) -> Finding:
    """Sum 4 MiB over all ranks, and compare with what the sum is. A collective."""
    backend, device = str(dist.get_backend(group)), communication_device(group)
    rank, world = dist.get_rank(), dist.get_world_size()
    seconds = []
    for _ in range(3):  # the first one also connects
        values = torch.full((_FLOATS,), float(rank + 1), device=device)
        start = time.perf_counter()
        dist.all_reduce(values, group=group)
        wrong = int((values != world * (world + 1) / 2).sum())
        seconds.append(time.perf_counter() - start)
        if wrong:
            text = f"{backend}: {wrong} of {_FLOATS} sums over {world} ranks are wrong"
            return Finding(
                f"all-reduce {backend}", "failed", text, "NCCL_DEBUG=INFO shows the path; see also NCCL_P2P_DISABLE"
            )
    slowest = torch.tensor([min(seconds)], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
    rate = 2 * (world - 1) / world * values.nbytes / slowest.item() / 1e9
    text = f"4 MiB over {world} ranks in {slowest.item() * 1e3:.1f} ms ({rate:.2g} GB/s)"
    return Finding(f"all-reduce {backend}", "ok", text)


def check_threshold(group: dist.ProcessGroup | None, seed: int = 0) -> Finding:
    """Look for the k-th smallest of random values spread over the ranks, both ways that ranks exchange counts.

    Compared with ``torch.kthvalue`` of the same values gathered, and between ranks. A collective.
    """
    backend, device = str(dist.get_backend(group)), communication_device(group)
    rank, world = dist.get_rank(), dist.get_world_size()
    count = max(_VALUES // world, 1000)
    generator = torch.Generator().manual_seed(seed + rank)
    values = (torch.randn(count, generator=generator) ** 2).to(device)  # risks are squares too
    rows = [torch.empty_like(values) for _ in range(world)]
    dist.all_gather(rows, values, group=group)
    k = int(0.6 * count * world)
    expected = torch.cat(rows).cpu().kthvalue(k).values
    answers = [kth_smallest([values], k, group, method=method) for method in ("all_gather", "all_reduce")]
    bits = torch.stack([expected, *answers]).view(torch.int32).to(device)
    everyone = [torch.empty_like(bits) for _ in range(world)]
    dist.all_gather(everyone, bits, group=group)
    different = [r for r, row in enumerate(everyone) if not torch.equal(row, everyone[0][:1].expand(len(bits)))]
    check = f"threshold {backend}"
    if different:
        text = (
            f"rank {_listed(different)} found another threshold than {expected.item():.9g} (torch.kthvalue on rank 0)"
        )
        return Finding(
            check, "failed", text, "run the doctor on each host alone, then on pairs, to find which one differs"
        )
    return Finding(check, "ok", f"{expected.item():.9g} of {count * world:,} values, the same bits on {world} ranks")


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def first_line(error: Exception) -> str:
    """Of its message."""
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
