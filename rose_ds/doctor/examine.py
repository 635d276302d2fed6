"""All checks in their order, on this rank and between ranks."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import rose_ds
from rose_ds.config import RoseConfig
from rose_ds.doctor import disk, environment, memory, ranks
from rose_ds.doctor.config import check_config, precision_of
from rose_ds.doctor.finding import Finding, merged
from rose_ds.doctor.questions import Questions
from rose_ds.eligible import eligible_names
from rose_ds.experiments.methods import Method, method_named
from rose_ds.experiments.models import ModelError, parameter_shapes
from rose_ds.experiments.provenance import commit
from rose_ds.masks import policy_of
from rose_ds.objectives import resolve


def examine(asked: Questions, variables: Mapping[str, str]) -> tuple[list[Finding], int]:
    """Run all checks; under a launcher every rank calls it, and gets the findings of all.

    Args:
        asked: the command line.
        variables: the process's environment.

    Returns:
        The findings, and the launcher's number of ranks. Where ranks are missing: those of this rank alone.
    """
    launch, launcher = ranks.launch_from(variables)
    found = [*_local(asked, variables, launch), *launcher]
    if launch is None:
        return found, 1
    joined = ranks.join(launch, asked.timeout + environment.BUILD_SECONDS * asked.build)
    if joined.status == "failed":
        return [*found, joined], launch.world_size
    everyone: list[Any] = [None] * launch.world_size
    # of rose_ds itself also the commit, where a rank knows it; a hostfile, say, may have been edited on one host alone
    versions = environment.installed() | {"rose_ds": rose_ds.__version__}
    mine = (commit() or "").removesuffix("-dirty")
    dist.all_gather_object(everyone, (found, versions, platform.node(), torch.cuda.is_available(), mine))
    hosts = [e[2] for e in everyone]
    if len({e[4] for e in everyone} - {""}) > 1:
        for e in everyone:
            e[1]["rose_ds"] += f" ({e[4] or 'an unknown commit'})"
    between = [joined, environment.same_everywhere([e[1] for e in everyone], hosts)]
    between.append(environment.same_devices([e[3] for e in everyone], hosts))
    between += [ranks.check_all_reduce(None), ranks.check_threshold(None)]
    between.append(_shared_output(Path(asked.output_dir), launch.rank))
    known = merged([e[0] for e in everyone])
    if all(e[3] for e in everyone) and dist.is_nccl_available():
        if launch.rank == 0:
            _tell_first([*known, *between])
        between += _nccl(known, memory.local_rank(variables), asked.timeout)
    gathered: list[Any] = [None] * launch.world_size
    try:
        dist.all_gather_object(gathered, between)
    except RuntimeError:  # others hang in NCCL, or were ended by it
        return [*known, *between], launch.world_size
    return [*known, *merged(gathered)], launch.world_size


def _local(asked: Questions, variables: Mapping[str, str], launch: ranks.Launch | None) -> list[Finding]:
    here = asked.world_size is None or launch is not None  # or else the run is planned for other hosts
    cpu_deepspeed = asked.deepspeed is not None and not torch.cuda.is_available()
    found = environment.check_versions(environment.required(), environment.installed())
    found += environment.check_compiler(needed=cpu_deepspeed and here)
    if asked.build and memory.local_rank(variables) == 0:
        found += environment.build_extension()
    found += environment.check_extension_locks(environment.extensions_folder())
    device = environment.check_device(memory.local_rank(variables), variables)
    found += device if here else [_of_this_host(f) for f in device]
    planned = asked.world_size or (1 if launch is None else launch.world_size)
    config: dict[str, Any] | None = None
    if asked.deepspeed is not None:
        findings, config = check_config(asked.deepspeed, planned, here=here, flag=asked.precision)
        found += findings
    half = precision_of(config or {}, asked.precision) != "fp32"
    parameters = 0
    if asked.model is not None:
        findings, parameters = _check_model(asked, config, half, planned, variables)
        found += findings if here else [_of_this_host(f) for f in findings]
    low = half and bool(config)  # without DeepSpeed what is saved is fp32
    checkpoint = memory.checkpoint_bytes(parameters, low) if parameters else None
    return found + disk.check_disk(Path(asked.output_dir), checkpoint, (2 if low else 4) * parameters)


def _check_model(
    asked: Questions, config: dict[str, Any] | None, half: bool, world: int, variables: Mapping[str, str]
) -> tuple[list[Finding], int]:
    assert asked.model is not None
    chosen = {} if asked.include is None else {"include": tuple(asked.include)}
    method = method_named(asked.method)
    rose = RoseConfig.from_mapping({**method.rose, **chosen})
    try:
        shapes = parameter_shapes(asked.model)
        eligible = [] if rose.strategy == "none" else eligible_names(rose, shapes)
    except ModelError as error:
        return [Finding("model", "failed", str(error), "download it where there is a network, and give the folder")], 0
    except ValueError as error:
        return [Finding("model", "failed", str(error), "the doctor and rose-ds train take --include")], 0
    parameters = sum(math.prod(shape) for shape in shapes.values())
    masked = sum(math.prod(shapes[name]) for name in eligible)
    alone = memory.Plan(0, world, half, deepspeed=False, masks=bool(eligible), risks=_risks(method, rose))
    there = memory.machine(memory.ranks_on_host(variables, world), memory.local_rank(variables))
    return memory.check_memory(parameters, masked, _plans(alone, config), there), parameters


def _risks(method: Method, rose: RoseConfig) -> int:
    """How many fp32 values a method keeps for each eligible element."""
    policy = policy_of(rose)
    # where the objective trains on the KL too, what ranks the task's gradient keeps the KL's apart (engines/batch.py)
    apart = resolve(method.objective).trains_on_risk and policy is not None and policy.ranks_task
    return (rose.uses_first or apart) + rose.keeps_risk


def _plans(alone: memory.Plan, config: dict[str, Any] | None) -> list[memory.Plan]:
    """What a config says, or all that a launcher may choose among. ``alone``: without DeepSpeed and shards."""
    if config:
        zero = config.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        offloaded = {
            name: isinstance(zero.get(name), dict) and zero[name].get("device") == "cpu"
            for name in ("offload_optimizer", "offload_param")
        }
        return [
            replace(
                alone,
                stage=stage,
                deepspeed=True,
                # DeepSpeed passes over what a stage has nothing for
                offload_optimizer=offloaded["offload_optimizer"] and stage >= 1,
                offload_parameters=offloaded["offload_param"] and stage == 3,
            )
        ]
    if alone.ranks == 1:
        return [alone]
    return [alone, *(replace(alone, stage=stage, deepspeed=True) for stage in range(4)), replace(alone, stage=3)]


def _of_this_host(finding: Finding) -> Finding:
    """A device or memory that is missing here may be there where the run is going to be."""
    if finding.check not in ("device", "memory") or finding.status != "failed":
        return finding
    return replace(finding, status="warning", text=f"{finding.text}, on this host")


def _tell_first(known: Sequence[Finding]) -> None:
    """NCCL's watchdog ends a process that hangs, and what is known with it."""
    lines = [finding.line() for finding in known if finding.status != "ok"]
    print("\n".join([*lines, "now NCCL; if nothing follows it hangs: NCCL_DEBUG=INFO shows where"]), file=sys.stderr)


def _nccl(known: Sequence[Finding], local_rank: int, seconds: float) -> list[Finding]:
    """Sums and a threshold over NCCL, where every rank has a GPU of its own."""
    if any(finding.check == "device" and finding.status == "failed" for finding in known):
        text = "not tried, as a rank has no GPU of its own"
        return [Finding("all-reduce nccl", "failed", text, "see device")]
    try:
        torch.cuda.set_device(local_rank)
        group = dist.new_group(backend="nccl", timeout=timedelta(seconds=seconds))
        return [ranks.check_all_reduce(group), ranks.check_threshold(group)]
    except RuntimeError as error:
        text = f"rank {dist.get_rank()} on {platform.node()}: {ranks.first_line(error)}"
        found = Finding("all-reduce nccl", "failed", text, f"NCCL_DEBUG=INFO shows the path; {ranks.INTERFACE}")
        print(found.line(), file=sys.stderr, flush=True)  # what it fails on may also end this process before the end
        return [found]


def _shared_output(output_dir: Path, rank: int) -> Finding:
    mark = disk.leave_mark(output_dir) if rank == 0 else None
    try:
        told: list[Any] = [None if mark is None else mark.name]
        dist.broadcast_object_list(told)
        saw = told[0] is not None and (disk.existing(output_dir) / told[0]).exists()
        seen: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(seen, saw)
    finally:
        if mark is not None:
            mark.unlink(missing_ok=True)
    return disk.shared_or_not(seen)
