"""This process's machine: packages, compiler, DeepSpeed's compiled extension, devices."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from packaging.requirements import Requirement

from rose_ds.doctor.finding import Finding
from rose_ds.hardware import has_bf16
from rose_ds.kernels import build as kernels

#: Whose versions change what a run computes; their pins are in rose_ds's own metadata.
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed")
#: A build takes about a minute. Who has held the lock for longer than this was killed.
BUILD_SECONDS = 600.0


def required() -> dict[str, Requirement]:
    """What rose_ds asks of ``PACKAGES``, by name; empty where rose_ds itself is not installed."""
    try:
        lines = importlib.metadata.requires("rose_ds") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = {requirement.name: requirement for requirement in map(Requirement, lines) if requirement.marker is None}
    return {name: found[name] for name in PACKAGES if name in found}


def installed() -> dict[str, str]:
    """Versions of ``PACKAGES`` that are there."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_versions(wanted: Mapping[str, Requirement], found: Mapping[str, str]) -> list[Finding]:
    """Compare installed versions with what rose_ds asks for."""
    if not wanted:
        told = ", ".join(f"{name} {version}" for name, version in found.items())
        return [Finding("versions", "warning", f"rose_ds is not installed, so its pins are unknown; {told}", _INSTALL)]
    wrong = []
    for name, requirement in wanted.items():
        if name not in found:
            wrong.append(f"{name} is missing ({requirement.specifier})")
        # +cpu or +cu126 says where a build runs, not what it is
        elif not requirement.specifier.contains(found[name].partition("+")[0], prereleases=True):
            wrong.append(f"{name} {found[name]} is not {requirement.specifier}")
    if wrong:
        pins = " ".join(f"'{requirement}'" for requirement in wanted.values())
        return [Finding("versions", "failed", "; ".join(wrong), f"pip install {pins}")]
    return [Finding("versions", "ok", ", ".join(f"{name} {found[name]}" for name in wanted))]


_INSTALL = "pip install -e . in the checkout"


def check_compiler(needed: bool) -> list[Finding]:
    """A C++ compiler and ninja, with which DeepSpeed builds its extension for CPU ranks, and rose_ds its kernels.

    Args:
        needed: whether a run without them fails.
    """
    from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available

    compiler = get_cxx_compiler()
    missing = [] if shutil.which(compiler) else [f"C++ compiler ({compiler})"]
    missing += [] if is_ninja_available() else ["ninja"]
    if not missing:
        return [Finding("compiler", "ok", f"{shutil.which(compiler)}, ninja")]
    mend = "apt install g++ (or set CXX to a compiler), pip install ninja"
    why = "the optimizer step on CPUs (offload) runs without compiled kernels"
    why = "DeepSpeed on CPU ranks builds an extension with it" if needed else why
    return [Finding("compiler", "failed" if needed else "warning", f"no {' and no '.join(missing)}: {why}", mend)]


def extensions_folder() -> Path:
    """Where torch puts the extensions that it builds."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return Path(given)
    from torch.utils.cpp_extension import get_default_build_root

    return Path(get_default_build_root())


def check_extension_locks(folder: Path, now: float | None = None) -> list[Finding]:
    """Locks of killed builds, on which every later job waits without a word.

    Args:
        folder: as ``extensions_folder()`` returns it.
        now: seconds since the epoch; default: the clock's.
    """
    locks = [*folder.glob("*/lock"), *folder.glob("*/*/lock")]
    # rose_ds's own builds wait for no lock that is left behind
    locks = [path for path in locks if kernels.PREFIX not in path.as_posix()]
    if not locks:
        built = sorted({path.stem for pattern in ("*/*.so", "*/*/*.so") for path in folder.glob(pattern)})
        return [Finding("extensions", "ok", f"{folder}: {', '.join(built) or 'nothing built yet'}, no lock")]
    ages = {path: (time.time() if now is None else now) - path.stat().st_mtime for path in locks}
    stale = [path for path, age in ages.items() if age > BUILD_SECONDS]
    if stale:
        names = ", ".join(map(str, stale))
        text = f"{names} is left from a build that was killed: DeepSpeed would wait for it for ever"
        return [Finding("extensions", "failed", text, f"rm {' '.join(map(str, stale))}")]
    text = f"{', '.join(map(str, locks))}: a build is under way, or was killed minutes ago"
    return [Finding("extensions", "warning", text, "wait for it, or remove the lock if no job is running")]


def build_extension() -> list[Finding]:
    """Build what DeepSpeed builds on first use on CPU ranks; about a minute the first time."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    start = time.monotonic()
    try:
        ShareMemCommBuilder().load(verbose=False)
    except Exception as error:  # whatever compiler, linker and loader raise: it is what the check is for
        text = f"DeepSpeed's extension for CPU ranks cannot be built: {str(error).strip().splitlines()[-1]}"
        return [Finding("build", "failed", text, "apt install g++ python3-dev, pip install ninja")]
    return [Finding("build", "ok", f"DeepSpeed's extension for CPU ranks, {time.monotonic() - start:.0f} s")]


def check_device(local_rank: int, variables: Mapping[str, str]) -> list[Finding]:
    """This rank's accelerator.

    Args:
        local_rank: its number among the host's ranks.
        variables: the process's environment.
    """
    if not torch.cuda.is_available():
        built, (sign, given) = torch.version.cuda or torch.version.hip, _sign_of_gpus(variables)
        if sign and not built:
            mend = "install a build for the GPUs; or CUDA_VISIBLE_DEVICES= (empty) where ranks shall train on the CPU"
            text = f"{sign}, but torch {torch.__version__} is a build for CPUs"
            return [Finding("device", "failed" if given else "warning", text, mend)]
        if sign:
            mend = (
                "python -c 'import torch; torch.cuda.init()' says why: a driver that is too old for this torch, or a "
                "container without them (docker run --gpus all, apptainer exec --nv); CUDA_VISIBLE_DEVICES= (empty) "
                "where ranks shall train on the CPU"
            )
            return [Finding("device", "failed", f"{sign}, but torch ({built}) sees no GPU", mend)]
        half = "bf16" if has_bf16("cpu") else "no bf16 instructions: use fp32"
        return [Finding("device", "ok", f"no GPU: ranks train on the CPU, with gloo; {half}")]
    count = torch.cuda.device_count()
    if local_rank >= count:
        mend = "start as many ranks on a host as it has GPUs, or make more of them visible (CUDA_VISIBLE_DEVICES)"
        return [Finding("device", "failed", f"local rank {local_rank} has no GPU: this host has {count}", mend)]
    half = "bf16" if has_bf16("cuda") else "no bf16: use fp16"
    return [Finding("device", "ok", f"{count} x {torch.cuda.get_device_name(local_rank)}, {half}")]


#: Values that say of a variable that no GPU is wanted, or that the job has none.
_NO_GPUS = {
    "DS_ACCELERATOR": ("cpu",),
    "CUDA_VISIBLE_DEVICES": ("", "-1", "NoDevFiles"),
    "SLURM_GPUS_ON_NODE": ("0",),
}


def _sign_of_gpus(variables: Mapping[str, str]) -> tuple[str, bool]:
    """What says that this host has GPUs, and whether the job was given some; empty: nothing, or they are not wanted."""
    if any(variables.get(name) in values for name, values in _NO_GPUS.items()):
        return "", False
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"):
        if variables.get(name):
            return f"{name}={variables[name]}", True
    signs = [path for path in ("/proc/driver/nvidia", "/dev/kfd", shutil.which("nvidia-smi")) if path]
    found = next((path for path in signs if Path(path).exists()), "")
    return f"there is a GPU driver ({found})" if found else "", False


def same_devices(gpus: Sequence[bool], hosts: Sequence[str]) -> Finding:
    """Whether all ranks have a GPU, or none has. Each argument by rank."""
    without = [rank for rank, there in enumerate(gpus) if not there]
    if not without or len(without) == len(gpus):
        return Finding("same devices", "ok", "a GPU for every rank" if not without else "no rank has a GPU")
    there = gpus.index(True)
    text = f"rank {without[0]} on {hosts[without[0]]} sees no GPU, rank {there} on {hosts[there]} does"
    return Finding("same devices", "failed", text, "run the doctor on that host alone")


def same_everywhere(versions: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> Finding:
    """Whether all ranks have the same packages. Each argument by rank."""
    odd = [rank for rank, found in enumerate(versions) if found != versions[0]]
    if not odd:
        many = len(set(hosts))
        return Finding("same versions", "ok", f"on all {len(hosts)} ranks, {many} host name{'s' * (many > 1)}")
    first = versions[odd[0]]
    differ = [
        f"{name} {versions[0].get(name)} and {first.get(name)}"
        for name in dict.fromkeys([*versions[0], *first])
        if first.get(name) != versions[0].get(name)
    ]
    text = f"rank 0 on {hosts[0]} and rank {odd[0]} on {hosts[odd[0]]} differ: {', '.join(differ)}"
    return Finding("same versions", "failed", text, "install the same on every host, or start from one image")
