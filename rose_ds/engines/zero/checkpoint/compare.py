"""What a checkpoint was saved with, against what this engine trains with."""

from __future__ import annotations

import uuid
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from rose_ds.config import RoseConfig
from rose_ds.engines.zero.checkpoint.agree import warn
from rose_ds.engines.zero.checkpoint.saved import Layout, Saved
from rose_ds.errors import RefusedConfiguration
from rose_ds.optimizer import RoseAdamW

_SAVED_AT = {
    "replicated": "at stage 0",
    "flat": "at stage 1 or 2",
    "bf16": "at stage 1 with bf16 and fp32 accumulation",
    "stage3": "at stage 3",
}


def record_of(engine: Any, base: RoseAdamW) -> dict[str, Any]:
    """What later loads compare with. The id, a collective, tells two checkpoints of the same tag apart."""
    identity = [uuid.uuid4().hex]
    dist.broadcast_object_list(identity)
    return {"id": identity[0], "config": _settings(base), "groups": _groups(engine, base), "shapes": _shapes(engine)}


def _settings(base: RoseAdamW) -> dict[str, Any]:
    """Of the masks, and the objective with its constants."""
    return {**asdict(base.config), "objective": (base.trained_objective or base.objective).record()}


def _shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """Of the trainable parameters."""
    trainable = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trainable}


def _groups(engine: Any, base: RoseAdamW) -> list[list[str]]:
    """Names in each of the optimizer's parameter groups."""
    z = engine.optimizer
    parts = getattr(z, "bit16_groups", None) or getattr(z, "bf16_groups", None) or getattr(z, "fp16_groups", None)
    if parts is None:
        parts = [group["params"] for group in base.param_groups]
    group_of = getattr(z, "sub_group_to_group_id", {})
    names: list[list[str]] = [[] for _ in base.param_groups]
    for i, params in enumerate(parts):
        names[group_of.get(i, i)] += [engine.param_names[p] for p in params]
    return names


def layout_of(engine: Any) -> Layout:
    """How this engine writes checkpoints."""
    if isinstance(engine.optimizer, BF16_Optimizer):
        return "bf16"
    stage = int(engine.zero_optimization_stage())
    return "stage3" if stage == 3 else "flat" if stage else "replicated"


def fits(engine: Any, saved: Saved) -> bool:
    """Whether each rank finds its own partition in a sharded checkpoint as it is."""
    partitions = [list(shapes) for shapes in engine._get_zero_param_shapes()]
    here = (layout_of(engine), dist.get_world_size(), partitions)
    return here == (saved.layout, saved.world_size, saved.partitions)


def compare(engine: Any, base: RoseAdamW, saved: Saved, load_scheduler: bool) -> None:
    """Warn where ROSE's settings were others.

    Raises:
        RefusedConfiguration: training cannot go on from the checkpoint.
    """
    _compare_models(engine, saved)
    precision = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
    if saved.precision != precision:
        raise RefusedConfiguration(
            f"{saved.folder} was saved in {saved.precision}, and this engine trains in {precision}: resume in "
            f"{saved.precision}"
        )
    here = layout_of(engine)
    if saved.layout != here and "replicated" in (saved.layout, here):
        there = _SAVED_AT.get(saved.layout, "at stage 1, 2 or 3")
        raise RefusedConfiguration(
            f"{saved.folder} was saved {there}, and this engine runs {_SAVED_AT[here]}: DeepSpeed converts between "
            "stages 1, 2 and 3 only. Resume at the stage it was saved at, on any number of ranks"
        )
    if load_scheduler and engine.lr_scheduler is not None and not saved.has_scheduler:
        raise RefusedConfiguration(
            f"{saved.folder} has no state of a learning-rate scheduler, and this engine has one: "
            "load_lr_scheduler_states=False starts it afresh"
        )
    if saved.record is None:
        warn(f"{saved.folder} has no ROSE record: it was not saved through rose_ds.prepare(), and nothing is compared")
        return
    groups = saved.record["groups"], _groups(engine, base)
    if groups[0] != groups[1]:
        sizes = [" + ".join(str(len(group)) for group in side) for side in groups]
        raise RefusedConfiguration(
            f"{saved.folder} was saved with other parameter groups ({sizes[0]} tensors, here {sizes[1]}), or with the "
            "same in another order: build the optimizer as it was built then"
        )
    then, now = saved.record["config"], _settings(base)
    # a setting that was not there yet did as its default does
    before = {**asdict(RoseConfig()), "objective": now["objective"], **then}
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            warn(f"{saved.folder} was saved with {name}={before.get(name)!r}; from here on {name}={now.get(name)!r}")


def compare_for_weights(engine: Any, saved: Saved, load_module_only: bool) -> None:
    """For a load of the weights alone.

    Raises:
        RefusedConfiguration: DeepSpeed would load nothing, or other weights, without a word.
    """
    _compare_models(engine, saved)
    stage3 = layout_of(engine) == "stage3"
    latest = saved.load_dir / "latest"
    if (
        saved.layout == "universal"
        or (saved.layout == "stage3") != stage3
        or (stage3 and load_module_only)  # loads nothing
        or (stage3 and not (latest.is_file() and latest.read_text().strip() == saved.tag))  # loads the latest
        or (stage3 and saved.world_size < dist.get_world_size())
    ):
        raise RefusedConfiguration(
            f"DeepSpeed cannot load the weights of {saved.folder} alone into this engine: give the model what "
            "deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(load_dir, tag) returns, before "
            "deepspeed.initialize()"
        )


def _compare_models(engine: Any, saved: Saved) -> None:
    here = _shapes(engine)
    trainable_only = saved.record is not None or saved.partitions is not None
    there = {name: shape for name, shape in saved.shapes.items() if trainable_only or name in here}
    wrong = [
        f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise RefusedConfiguration(f"{saved.folder} is of other trainable parameters: {'; '.join(wrong[:3])}{more}")
