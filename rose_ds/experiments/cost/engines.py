"""A model with a method's stepper on any of the engines, for measuring steps."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rose_ds import RoseAdamW, Stepper, prepare

_SETTINGS: dict[str, Any] = {"lr": 2e-5}
_CLIP = 1.0


@dataclass(frozen=True)
class Placement:
    """What a method's steps are measured on."""

    engine: str
    """One of MEASURED."""
    rows: int
    """Of a rank's micro-batch."""
    accumulation: int
    bf16: bool
    device: torch.device

    def autocast(self) -> AbstractContextManager[object]:
        """Around forward passes, where the engine leaves precision to it."""
        asked = self.bf16 and self.engine in ("plain", "ddp")
        return torch.autocast(self.device.type, torch.bfloat16) if asked else nullcontext()

    def place(self, model: nn.Module, rose: dict[str, Any], objective: Any) -> tuple[Any, Stepper]:
        """What runs forward passes, and its stepper. A collective."""
        if self.engine.startswith("zero"):
            return self._deepspeed(model, int(self.engine[4:]), rose, objective)
        wrapped = ENGINES[self.engine](model.to(self.device), self)
        optimizer = RoseAdamW(wrapped.named_parameters(), **_SETTINGS, **rose)
        stepper = prepare(
            wrapped, optimizer, objective=objective, accumulation_steps=self.accumulation, max_grad_norm=_CLIP
        )
        return wrapped, stepper

    def _deepspeed(self, model: nn.Module, stage: int, rose: dict[str, Any], objective: Any) -> tuple[Any, Stepper]:
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": self.rows,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": _CLIP,
            "optimizer": {"type": "RoseAdamW", "params": {**_SETTINGS, **rose}},
            "zero_optimization": {"stage": stage},
            "steps_per_print": 10**9,
            **({"bf16": {"enabled": True}} if self.bf16 else {}),
        }
        engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
        return engine, prepare(engine, objective=objective)


def join(device: torch.device) -> tuple[int, int]:
    """Rank and number of ranks; joins the process group where the environment names one."""
    if "RANK" not in os.environ:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def _ddp(model: nn.Module, where: Placement) -> nn.Module:
    ids = [torch.cuda.current_device()] if where.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def _fsdp2(model: nn.Module, where: Placement) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from rose_ds.engines.torch.fsdp2 import shard_by_layer

    low = torch.bfloat16 if where.bf16 else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None)
    shard_by_layer(model, where.device, mp_policy=policy)
    return model


#: What makes of a model what the engine runs; ZeRO's are DeepSpeed's affair.
ENGINES: dict[str, Callable[[nn.Module, Placement], nn.Module]] = {
    "plain": lambda model, _: model,
    "ddp": _ddp,
    "fsdp2": _fsdp2,
}
MEASURED = (*ENGINES, "zero0", "zero1", "zero2", "zero3")
