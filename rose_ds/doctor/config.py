"""What is wrong with a DeepSpeed config, as far as the file and the machine tell."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch

from rose_ds.deepspeed_config import read
from rose_ds.doctor.finding import Finding
from rose_ds.engines.zero.refuse import refused_by_file
from rose_ds.errors import RefusedConfiguration
from rose_ds.optimizer import RoseAdamW

#: Sections whose misspelt names DeepSpeed passes over without a word.
_SECTIONS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "data_types",
    "torch_autocast",
    "compile",
    "managed_gradient_accumulation",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
)

#: Old names of sections, a true or false each, that DeepSpeed still reads (deepspeed/runtime/zero/config.py).
_OLD_NAMES = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}


def check_config(
    path: str, world_size: int, *, here: bool = True, flag: str | None = None
) -> tuple[list[Finding], dict[str, Any]]:
    """Everything that is wrong with a config file, and the config; it is empty where it cannot be read.

    Args:
        path: of the JSON file.
        world_size: of the job.
        here: it is going to run on hosts like this one.
        flag: bf16 or fp16, where the run has that flag.
    """
    try:
        config = read(path, "--deepspeed")
    except RefusedConfiguration as error:
        return [Finding("config", "failed", str(error), "compare with the files in ds_configs/")], {}
    wrong = _parsed(config)
    config = _renamed(config)
    wrong += [
        *refused_by_file(config),
        *_optimizer(config),
        *_unsavable(config),
        *_batch(config, world_size),
    ]
    odd = _misspelt(config)
    (wrong if here else odd).extend(_machine(precision_of(config, flag)))
    findings = [Finding("config", "failed", f"{path}: {text}", mend) for text, mend in map(_split, wrong)]
    findings += [Finding("config", "warning", f"{path}: {text}", mend) for text, mend in map(_split, odd)]
    if not findings:
        stage = config.get("zero_optimization", {}).get("stage", 0)
        precision = _with_flags(config, precision_of(config, flag))
        findings = [Finding("config", "ok", f"{path}: ZeRO-{stage}, {precision}, nothing that is refused")]
    return findings, config


def precision_of(config: Mapping[str, Any], flag: str | None) -> str:
    """bf16, fp16 or fp32.

    Args:
        config: DeepSpeed's.
        flag: bf16 or fp16, where the run has that flag. It decides where the section says "auto" or is not there
            (accelerate/utils/dataclasses.py, DeepSpeedPlugin.set_mixed_precision).
    """
    enabled = {name: config.get(name, {"enabled": "auto"}).get("enabled") for name in ("bf16", "fp16")}
    fixed = [name for name, value in enabled.items() if value is True]
    if fixed:
        return fixed[0]
    return flag if flag is not None and enabled[flag] == "auto" else "fp32"


def _with_flags(config: Mapping[str, Any], precision: str) -> str:
    """The precision, and the flags that it follows."""
    follows = [f"--{name}" for name in ("bf16", "fp16") if config.get(name, {}).get("enabled") == "auto"]
    if f"--{precision}" in follows:
        return f'{precision} ("auto" follows --{precision})'
    if precision == "fp32" and follows:
        return f'fp32 ("auto" follows {" and ".join(follows)}, which the doctor was not given)'
    return precision


def _renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as DeepSpeed is going to read it, without its old names."""
    zero = dict(config.get("zero_optimization", {}))
    for old, new in _OLD_NAMES.items():
        if zero.pop(old, None) is True:
            zero.setdefault(new, {"device": "cpu"})
    return {**config, "zero_optimization": zero}


def _split(message: str) -> tuple[str, str]:
    """What is wrong, and the way out: rose_ds's messages have it after the last colon."""
    text, _, mend = message.rpartition(": ")
    return (text, mend) if text else (message, "")


def _parsed(config: Mapping[str, Any]) -> list[str]:
    """What DeepSpeed's own schema says of the sections whose unknown names it refuses, and of settings it once had."""
    from deepspeed.runtime.config import DeepSpeedConfigError, _reject_removed_config_keys
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    wrong = []
    try:
        _reject_removed_config_keys(config)
    except DeepSpeedConfigError as error:
        wrong.append(f"{error}: remove it")
    sections = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for name, schema in sections.items():
        try:
            schema(**config.get(name, {}))
        except ValidationError as error:
            wrong += [
                f"{name}.{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}: correct or remove it"
                for e in error.errors()
            ]
        except (ValueError, TypeError, AssertionError) as error:
            wrong.append(f"{name} {error}: correct or remove it")
    return wrong


def _optimizer(config: Mapping[str, Any]) -> list[str]:
    wrong = []
    zero = config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer")
    offloaded = isinstance(offload, dict) and offload.get("device", "none") != "none"
    block = config.get("optimizer")
    # an optimizer of the config's own is made as it says
    if offloaded and block is None and config.get("zero_force_ds_cpu_optimizer", True):
        wrong.append(
            "offload_optimizer would demand DeepSpeedCPUAdam, which cannot mask: set "
            '"zero_force_ds_cpu_optimizer" to false at the top level'
        )
    if block is None:
        return wrong  # rose-ds train and RoseTrainer bring their own
    if block.get("type") != "RoseAdamW":
        found = block.get("type")
        return [*wrong, f'"optimizer" is {found!r}, not RoseAdamW: set "type" to "RoseAdamW", or leave the block out']
    settings = {name: value for name, value in block.get("params", {}).items() if value != "auto"}
    try:
        RoseAdamW([("layer.0.weight", torch.nn.Parameter(torch.zeros(1)))], **settings)
    except (ValueError, TypeError) as error:
        return [*wrong, f'"optimizer" of type RoseAdamW, {error}: correct "params"']
    return wrong


def _unsavable(config: Mapping[str, Any]) -> list[str]:
    zero = config.get("zero_optimization", {})
    key = "stage3_gather_16bit_weights_on_model_save"
    if zero.get("stage") == 3 and zero.get(key) is not True:
        return [f"at ZeRO-3 rose-ds train cannot save the model whole without zero_optimization.{key}: set it to true"]
    return []


def _machine(precision: str) -> list[str]:
    wrong = []
    cuda = torch.cuda.is_available()
    if precision == "fp16" and not cuda:
        wrong.append("fp16 is not there on CPU ranks: use bf16 or fp32")
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported():
        wrong.append(f"{torch.cuda.get_device_name()} has no bf16: use fp16 or fp32")
    return wrong


def _batch(config: Mapping[str, Any], world_size: int) -> list[str]:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    numbers = [config.get(name) for name in names]
    if all(isinstance(number, int) for number in numbers):
        whole, micro, steps = (int(number) for number in numbers if isinstance(number, int))
        if whole != micro * steps * world_size:
            return [
                f"train_batch_size {whole} is not {micro} rows x {steps} micro-batches x {world_size} ranks = "
                f'{micro * steps * world_size}: leave one of them out, or write "auto" for all three'
            ]
    return []


def _misspelt(config: Mapping[str, Any]) -> list[str]:
    found = []
    for name in config:
        close = difflib.get_close_matches(name, _SECTIONS, n=1, cutoff=0.8)
        if close and name not in _SECTIONS:
            found.append(f'"{name}" is not a setting of DeepSpeed, which passes it over: write "{close[0]}"')
    return found
