"""DeepSpeed settings under which ROSE's gradients or masks would silently be wrong."""

from __future__ import annotations

from typing import Any

import torch

from rose_ds.errors import RefusedConfiguration
from rose_ds.optimizer import RoseAdamW

#: Whose private names the adapters use. Another version may have moved them without an error.
SUPPORTED_DEEPSPEED = "0.19.8"

#: What is refused, and the way out; the same words for an engine and for a config file.
_REFUSED = {
    "round_robin_gradients": (
        "zero_optimization.round_robin_gradients reorders the partitions, so slices would get the wrong names: set "
        "it to false"
    ),
    "parameter_alignment": (
        "zero_optimization.parameter_alignment puts padding between parameters, which shifts DeepSpeed's own "
        "fragment index: remove it"
    ),
    "zero++": (
        "ZeRO++ (zero_hpz_partition_size, zero_quantized_gradients, zero_quantized_weights, "
        "zero_quantized_nontrainable_weights) is not known to keep the two gradients of a step exact, nor frozen "
        "weights: leave these settings out"
    ),
    "nvme": 'zero_optimization.offload_*.device "nvme" swaps gradients and states out behind the optimizer: use "cpu"',
    "ratio": (
        "zero_optimization.offload_optimizer.ratio < 1 updates a part of the model with another optimizer: set 1.0"
    ),
    "super_offload": "offload_optimizer.super_offload steps outside the optimizer: remove it",
    "zenflow": "zero_optimization.zenflow updates selected gradients on its own: remove it",
    "deepcompile": (
        "compile.deepcompile rewrites the backward pass, whose gradients rose_ds must see twice: set it to false"
    ),
    "pipeline": "pipeline parallelism runs forward and backward in one schedule, so there is no second pass: use ZeRO",
    "experts": (
        "mixture-of-experts layers (expert_parallel) reduce in other groups than rose_ds exchanges over: use a model "
        "without"
    ),
    "mpu": (
        "model parallelism (mpu, tensor_parallel.autotp_size) splits tensors over ranks that rose_ds does not exchange "
        "with: use ZeRO-3"
    ),
    "accumulation": "managed_gradient_accumulation=false hides the accumulation boundary: set it to true",
    "sequences": (
        "sequence parallelism (mesh_param, sequence_parallel_size) splits rows over ranks that rose_ds does not "
        "exchange with: use data parallelism alone"
    ),
    "norm": (
        "zero_optimization.compute_grad_norm=false leaves out the norm that shows a gradient that is not finite, which "
        "would be trained on: set it to true"
    ),
    "writer": (
        "checkpoint.writer with decoupled=true, and DataStates, write a checkpoint after save_checkpoint() has "
        "returned, and rose_ds would call one whole that is not: leave them out"
    ),
    "rounded masters": (
        "zero_optimization.load_from_fp32_weights=false makes the fp32 weights of low-precision ones when a checkpoint "
        "is loaded, in which most small updates are lost: leave it at true"
    ),
    "autocast": (
        'torch_autocast in fp16, which it is without a "dtype" too, scales no losses: set its "dtype" to "bfloat16", '
        'or use an "fp16" or "bf16" section instead'
    ),
    "half reduction": (
        'communication_data_type "fp16" without an "fp16" section reduces gradients that no loss scale keeps from '
        'becoming zero: set it to "bf16" or "fp32", or leave it out'
    ),
    "half weights": (
        "the model's weights are in low precision and the config has no section for it, so nothing keeps fp32 masters "
        'and most small updates round to nothing: load the model in fp32, or add "bf16": {"enabled": true}'
    ),
    "half masters": (
        "bf16/fp16 master weights (bf16_master_weights_and_grads, fp16_master_weights_and_grads) lose ROSE's small "
        "updates: keep fp32 masters"
    ),
}


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
    for name, refused in _findings(engine).items():
        if refused:
            raise RefusedConfiguration(_REFUSED[name])


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


def _findings(engine: Any) -> dict[str, bool]:
    zero = engine._config.zero_config
    stage = int(engine.zero_optimization_stage())
    offload = [o for o in (zero.offload_optimizer, zero.offload_param) if o is not None]
    masters = getattr(engine.optimizer, "single_partition_of_fp32_groups", None)
    masters = masters or getattr(engine.optimizer, "fp32_partitioned_groups_flat", None) or []
    return {
        "round_robin_gradients": stage in (1, 2) and engine.zero_round_robin_gradients(),
        "parameter_alignment": bool(engine.zero_parameter_alignment()),
        "zero++": stage == 3
        and (
            zero.zero_hpz_partition_size > 1
            or zero.zero_quantized_gradients
            or zero.zero_quantized_weights
            or zero.zero_quantized_nontrainable_weights
        ),
        "nvme": any(str(getattr(o.device, "value", o.device)) == "nvme" for o in offload),
        "ratio": zero.offload_optimizer is not None and zero.offload_optimizer.ratio < 1.0,
        "super_offload": bool(engine.super_offload()),
        "zenflow": bool(engine.zenflow),
        "deepcompile": engine.is_deepcompile_enabled(),
        "pipeline": bool(getattr(engine, "pipeline_parallelism", False)),
        "experts": bool(engine.has_moe_layers),
        "mpu": engine.mpu is not None,
        "sequences": engine.mesh_device is not None or engine.sequence_parallel_size > 1,
        "norm": stage in (1, 2)
        and not (engine.zero_compute_grad_norm() or getattr(engine.optimizer, "check_grad_overflow", False)),
        "writer": engine.checkpoint_engine.is_decoupled(),
        "rounded masters": not zero.load_from_fp32_weights and (engine.fp16_enabled() or engine.bfloat16_enabled()),
        "accumulation": not engine.managed_gradient_accumulation(),
        "autocast": engine.torch_autocast_enabled() and engine.torch_autocast_dtype() != torch.bfloat16,
        "half reduction": engine._config.communication_data_type == torch.float16 and not engine.fp16_enabled(),
        "half weights": isinstance(engine.optimizer, RoseAdamW)
        and any(p.dtype != torch.float32 for group in engine.optimizer.param_groups for p in group["params"]),
        "half masters": engine.zero_optimization() and any(p.dtype != torch.float32 for p in masters),
    }


def refused_by_file(config: dict[str, Any]) -> list[str]:
    """What ``check_engine`` would refuse, as far as the config file alone tells; one message for each.

    Args:
        config: as ``rose_ds.deepspeed_config.read`` returns it.
    """
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    sections = {name: _section(zero, name) for name in ("offload_optimizer", "offload_param")}
    autocast = _section(config, "torch_autocast")
    ratio = sections["offload_optimizer"].get("ratio", 1.0)
    bf16 = _section(config, "bf16") or _section(config, "bfloat16")
    overflow_seen = _section(config, "fp16").get("enabled") in (True, "auto") or (
        bf16.get("enabled") in (True, "auto") and bf16.get("check_grad_overflow") is not False
    )
    found = {
        "round_robin_gradients": stage in (1, 2) and zero.get("round_robin_gradients") is True,
        "parameter_alignment": zero.get("parameter_alignment") is True,
        "zero++": stage == 3
        and (
            _above_one(zero.get("zero_hpz_partition_size"))
            or zero.get("zero_quantized_gradients") is True
            or zero.get("zero_quantized_weights") is True
            or zero.get("zero_quantized_nontrainable_weights") is True
        ),
        "nvme": any(section.get("device") == "nvme" for section in sections.values()),
        "ratio": isinstance(ratio, int | float) and ratio < 1,
        "super_offload": sections["offload_optimizer"].get("super_offload") is True,
        "zenflow": zero.get("zenflow") is not None,
        "deepcompile": _section(config, "compile").get("deepcompile") is True,
        "experts": _section(config, "expert_parallel").get("enabled") is True,
        "mpu": _above_one(_section(config, "tensor_parallel").get("autotp_size")),
        "sequences": _above_one(config.get("sequence_parallel_size")),
        "norm": stage in (1, 2) and zero.get("compute_grad_norm") is False and not overflow_seen,
        "writer": _section(_section(config, "checkpoint"), "writer").get("decoupled") is True
        or config.get("datastates_ckpt") is not None,
        "rounded masters": zero.get("load_from_fp32_weights") is False
        and (overflow_seen or bf16.get("enabled") is True),
        "accumulation": config.get("managed_gradient_accumulation") is False,
        "autocast": autocast.get("enabled") is True
        and autocast.get("dtype") not in ("bfloat16", "bf16", "torch.bfloat16"),
        "half reduction": config.get("communication_data_type") == "fp16"
        and _section(config, "fp16").get("enabled") not in (True, "auto"),
        "half masters": bf16.get("bf16_master_weights_and_grads") is True
        or _section(config, "fp16").get("fp16_master_weights_and_grads") is True,
    }
    return [_REFUSED[name] for name, refused in found.items() if refused]


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _above_one(value: object) -> bool:
    return isinstance(value, int) and value > 1
