"""The engines by name, and which of them a model needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rose_ds.engines.base import Engine
from rose_ds.errors import RefusedConfiguration
from rose_ds.optimizer import RoseAdamW

ENGINES = ("plain", "ddp", "fsdp1", "fsdp2", "zero0", "zero1", "zero2", "zero3")

#: Classes of torch that run or are another module. Looked up by name: importing FSDP takes a second.
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "ReplicateModule", "FSDPModule")


def engine_for(
    model: nn.Module, optimizer: RoseAdamW | None, accumulation_steps: int, max_grad_norm: float | None
) -> Engine:
    """The engine of a model, whatever runs it; see ``rose_ds.prepare``."""
    if isinstance(accumulation_steps, bool) or not isinstance(accumulation_steps, int) or accumulation_steps < 1:
        raise ValueError(f"{accumulation_steps=} must be an integer >= 1")
    if max_grad_norm is not None and not max_grad_norm >= 0:
        raise ValueError(f"{max_grad_norm=} must be >= 0, or None")
    _refuse_another_device(model)
    if _is_a(model, "deepspeed.runtime.engine", "DeepSpeedEngine"):
        from rose_ds.engines.zero import ZeroEngine  # deepspeed is imported only where it is used

        allow_two_backwards_when_compiled(model.module)
        if optimizer is not None or accumulation_steps != 1 or max_grad_norm is not None:
            raise ValueError(
                "prepare(deepspeed_engine) takes optimizer, accumulation and clipping from the engine: set them in the "
                "DeepSpeed config (optimizer, gradient_accumulation_steps, gradient_clipping)"
            )
        return ZeroEngine(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module or a DeepSpeedEngine, got {type(model).__name__}")
    compiled = allow_two_backwards_when_compiled(model)
    model = _uncompiled(model)
    engine = _torch_engine(model)(model, rose_optimizer(optimizer), accumulation_steps, max_grad_norm)
    engine.compiled = compiled
    return engine


def _refuse_another_device(model: nn.Module) -> None:
    """torch draws random numbers, and NCCL joins ranks, on the process's current device."""
    own = torch.accelerator.current_accelerator(check_available=True)
    if own is None or not isinstance(model, nn.Module):
        return
    current = torch.accelerator.current_device_index()
    for param in model.parameters():
        if param.device.type == own.type and param.device.index not in (None, current):
            raise RefusedConfiguration(
                f"the model lies on {param.device}, but the process's current device is {own.type}:{current}, whose "
                "random numbers are replayed and over which ranks agree: call "
                f"torch.accelerator.set_device_index({param.device.index}) first, in each process before its group is "
                "made"
            )


def _torch_engine(model: nn.Module) -> Callable[[Any, RoseAdamW, int, float | None], Engine]:
    wrapper = _wrapper_of(model)
    for name, part in model.named_modules():
        inner = _wrapper_of(part)
        if inner is not None and inner != wrapper:
            raise TypeError(
                f"{name!r} is wrapped in {inner}, but the model given to prepare() is "
                f"{'a plain ' + type(model).__name__ if wrapper is None else wrapper}: wrap the whole model in one of "
                "DistributedDataParallel, FullyShardedDataParallel or fully_shard, and give prepare() the result"
            )
    # each is imported only where it is used
    if wrapper == "DistributedDataParallel":
        from rose_ds.engines.torch.ddp import DdpEngine

        return DdpEngine
    if wrapper == "FullyShardedDataParallel":
        from rose_ds.engines.torch.fsdp1 import Fsdp1Engine

        return Fsdp1Engine
    if wrapper == "FSDPModule":
        from rose_ds.engines.torch.fsdp2 import Fsdp2Engine

        return Fsdp2Engine
    if wrapper is not None:
        raise TypeError(
            f"{wrapper} is not supported by prepare(): start one process for each device and use "
            "DistributedDataParallel, fully_shard or DeepSpeed"
        )
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise TypeError(
            f"a plain module ({type(model).__name__}) in a job of several processes would train a separate model on "
            "each: pass what DistributedDataParallel, FullyShardedDataParallel or fully_shard made of it, or the "
            "DeepSpeedEngine that deepspeed.initialize() returned"
        )
    from rose_ds.engines.torch.plain import PlainEngine

    return PlainEngine


def _wrapper_of(module: nn.Module) -> str | None:
    return next((name for name in _WRAPPERS if _is_a(module, "torch.", name)), None)


def _uncompiled(model: nn.Module) -> nn.Module:
    while _is_a(model, "torch.", "OptimizedModule"):
        model = model._orig_mod  # type: ignore[assignment]
    return model


def allow_two_backwards_when_compiled(module: Any) -> bool:
    """A compiled forward pass whose backward runs twice must not give its buffers away in the first. Whether there is
    one.

    Asked for before anything is compiled, since it is part of the compiled code.
    """
    compiled = (_is_a(m, "torch.", "OptimizedModule") or m._compiled_call_impl is not None for m in module.modules())
    if not any(compiled):
        return False
    import torch._functorch.config as functorch

    functorch.donated_buffer = False
    return True


def rose_optimizer(optimizer: Any) -> RoseAdamW:
    """The RoseAdamW itself, also from inside accelerate's AcceleratedOptimizer.

    Of no other wrapper: its step() would never be called, or know nothing of the masks.
    """
    inner = optimizer
    while _is_a(inner, "accelerate.", "AcceleratedOptimizer"):
        if getattr(inner, "scaler", None) is not None:
            raise RefusedConfiguration(
                'mixed_precision="fp16" scales the loss outside rose_ds: use "bf16", or fp16 through DeepSpeed'
            )
        inner = inner.optimizer
    if isinstance(getattr(inner, "optimizer", None), RoseAdamW):
        raise RefusedConfiguration(
            f"{type(inner).__name__} wraps RoseAdamW, and its own step() would not be called: give prepare() the "
            "RoseAdamW, and do what the wrapper does in your loop, after stepper.step()"
        )
    if not isinstance(inner, RoseAdamW):
        raise TypeError(
            f"prepare(model, optimizer) needs RoseAdamW(model.named_parameters(), ...), got {type(optimizer).__name__}"
        )
    return inner


def _is_a(model: object, package: str, cls: str) -> bool:
    return any(base.__module__.startswith(package) and base.__name__ == cls for base in type(model).__mro__)
