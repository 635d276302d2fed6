"""DeepSpeed settings under which ROSE's gradients or masks would silently be wrong."""

from __future__ import annotations

from typing import Any

import torch

from rose_ds.errors import RefusedConfiguration
from rose_ds.optimizer import RoseAdamW

#: Whose private names the adapters use. Another version may have moved them without an error.
SUPPORTED_DEEPSPEED = "0.19.8"


def check_version(version: str) -> None:
    """Raise unless this is the DeepSpeed release that the adapters were written against."""
    if version.split("+")[0] != SUPPORTED_DEEPSPEED:
        raise RefusedConfiguration(
            f"deepspeed {version} is installed; rose_ds uses private parts of deepspeed {SUPPORTED_DEEPSPEED} to keep "
            f"a second gradient apart: pip install deepspeed=={SUPPORTED_DEEPSPEED}"
        )


def check_engine(engine: Any) -> None:
    """Raise RefusedConfiguration, naming the setting and the way out, for anything rose_ds would get wrong."""
    import deepspeed

    check_version(deepspeed.__version__)
    for refused, message in _findings(engine):
        if refused:
            raise RefusedConfiguration(message)


def rose_optimizer_of(engine: Any) -> RoseAdamW:
    """The RoseAdamW inside DeepSpeed's optimizer wrapper."""
    outer = engine.optimizer
    base = outer if isinstance(outer, RoseAdamW) else getattr(outer, "optimizer", None)
    if not isinstance(base, RoseAdamW):
        found = type(base if base is not None else outer).__name__
        raise RefusedConfiguration(
            f"the engine's optimizer is {found}, not RoseAdamW: import rose_ds before deepspeed.initialize() and set "
            '"optimizer": {"type": "RoseAdamW", "params": {...}} in the DeepSpeed config (with offload too: '
            "DeepSpeedCPUAdam cannot mask)"
        )
    return base


def _findings(engine: Any) -> list[tuple[bool, str]]:
    zero = engine._config.zero_config
    stage = int(engine.zero_optimization_stage())
    offload = [o for o in (zero.offload_optimizer, zero.offload_param) if o is not None]
    masters = getattr(engine.optimizer, "single_partition_of_fp32_groups", None)
    masters = masters or getattr(engine.optimizer, "fp32_partitioned_groups_flat", None) or []
    return [
        (
            stage in (1, 2) and engine.zero_round_robin_gradients(),
            "zero_optimization.round_robin_gradients reorders the partitions, so slices would get the wrong names: set "
            "it to false",
        ),
        (
            bool(engine.zero_parameter_alignment()),
            "zero_optimization.parameter_alignment puts padding between parameters, which shifts DeepSpeed's own "
            "fragment index: remove it",
        ),
        (
            stage == 3
            and (zero.zero_hpz_partition_size > 1 or zero.zero_quantized_gradients or zero.zero_quantized_weights),
            "ZeRO++ (zero_hpz_partition_size, zero_quantized_gradients, zero_quantized_weights) is not known to keep "
            "the two gradients of a step exact: leave these settings out",
        ),
        (
            any(str(getattr(o.device, "value", o.device)) == "nvme" for o in offload),
            'zero_optimization.offload_*.device "nvme" swaps gradients and states out behind the optimizer: use "cpu"',
        ),
        (
            zero.offload_optimizer is not None and zero.offload_optimizer.ratio < 1.0,
            "zero_optimization.offload_optimizer.ratio < 1 updates a part of the model with another optimizer: set 1.0",
        ),
        (bool(engine.super_offload()), "offload_optimizer.super_offload steps outside the optimizer: remove it"),
        (bool(engine.zenflow), "zero_optimization.zenflow updates selected gradients on its own: remove it"),
        (
            engine.is_deepcompile_enabled(),
            "compile.deepcompile rewrites the backward pass, whose gradients rose_ds must see twice: set it to false",
        ),
        (
            bool(getattr(engine, "pipeline_parallelism", False)),
            "pipeline parallelism runs forward and backward in one schedule, so there is no second pass: use ZeRO",
        ),
        (bool(engine.has_moe_layers), "mixture-of-experts layers reduce in other groups than rose_ds exchanges over"),
        (
            engine.mpu is not None,
            "model parallelism (mpu) splits tensors over ranks that rose_ds does not exchange with: use ZeRO-3",
        ),
        (
            not engine.managed_gradient_accumulation(),
            "managed_gradient_accumulation=false hides the accumulation boundary: set it to true",
        ),
        (
            engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16,
            'torch_autocast with fp16 scales losses outside the engine: use "fp16" or "bf16" sections instead',
        ),
        (
            engine.zero_optimization() and any(p.dtype != torch.float32 for p in masters),
            "bf16/fp16 master weights (bf16_master_weights_and_grads, fp16_master_weights_and_grads) lose ROSE's small "
            "updates: keep fp32 masters",
        ),
    ]
