"""DeepSpeed's universal checkpoints: made once for each checkpoint, completed with what DeepSpeed leaves out."""

from __future__ import annotations

import io
import logging
import tempfile
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.constants import (
    CLIP_GRAD,
    DS_VERSION,
    FROZEN_PARAM_FRAGMENTS,
    FROZEN_PARAM_SHAPES,
    LOSS_SCALER,
    OPTIMIZER_STATE_DICT,
    PARAM,
    PARAM_GROUPS,
    PARAM_SHAPES,
)
from torch import Tensor

from rose_ds.engines.zero.checkpoint.saved import MODEL_FILES, RECORD, Layout, Saved, model_files_of, peek
from rose_ds.errors import RefusedConfiguration
from rose_ds.optimizer import RoseAdamW

logger = logging.getLogger(__name__)

#: Marks an optimizer_state.pt that any stage can load.
_COMPLETE = "rose_ds_complete"
#: What stages 1 and 2 read of it, beside the parameter groups.
_GLOBAL = (LOSS_SCALER, "dynamic_loss_scale", "overflow", CLIP_GRAD)


def convert(saved: Saved) -> str:
    """Convert a checkpoint, unless that was done already; on one rank. The new folder's tag.

    The folder appears whole or not at all: it is made beside the checkpoint under a hidden name.
    """
    target = saved.folder.with_name(f"{saved.folder.name}_universal")
    tag = f"{saved.tag}_universal"
    if _made_of(target, saved):
        return tag
    logger.info("converting %s into %s for another number of ranks or another stage", saved.folder, target)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        options = Namespace(
            input_folder=str(saved.folder),
            output_folder=str(made),
            num_extract_workers=1,  # more would fork a process that holds a process group
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,  # stage 2 writes no universal_checkpoint_info
        )
        try:
            with redirect_stdout(io.StringIO()):
                ds_to_universal.main(options)
        except Exception as error:
            raise RuntimeError(f"{saved.folder} could not be converted into {target}: {error}") from error
        if target.exists():  # of an earlier checkpoint with this tag
            target.rename(Path(scratch) / "outdated")
        made.rename(target)
    return tag


def _made_of(target: Path, saved: Saved) -> bool:
    """Whether ``target`` is the conversion of this very checkpoint, and not of one that had its tag before."""
    if saved.record is None or not target.is_dir():
        return False
    record = peek(model_files_of(target)[0]).get(RECORD)
    return record is not None and record["id"] == saved.record["id"]


def complete(folder: Path, layout: Layout) -> None:
    """Add what DeepSpeed's loader of ``layout`` looks for and its converter may not have written; on one rank."""
    path = folder / "zero" / "optimizer_state.pt"
    head, state = peek(model_files_of(folder)[0]), peek(path)
    parameters = sorted(file.parent for file in (folder / "zero").glob("*/exp_avg.pt"))
    if _COMPLETE not in state:
        for name in MODEL_FILES:  # stages 1 and 2 look for another file than stage 3
            if not (folder / name).exists():
                _write({**head, "module": {}, FROZEN_PARAM_FRAGMENTS: None}, folder / name)
        from_stage3 = OPTIMIZER_STATE_DICT in state  # which keeps the step only there
        step = state[OPTIMIZER_STATE_DICT]["state"][0]["step"] if from_stage3 else peek(parameters[0] / "step.pt")
        for parameter in parameters if from_stage3 else ():
            _write(step, parameter / "step.pt")
        groups = state[PARAM_GROUPS]
        kept = {name: state[name] for name in _GLOBAL if name in state}
        own = {"state": {0: {"step": step}}, PARAM_GROUPS: groups}
        _write(
            {**kept, DS_VERSION: head[DS_VERSION], PARAM_GROUPS: groups, OPTIMIZER_STATE_DICT: own, _COMPLETE: True},
            path,
        )
    if layout == "stage3":
        return
    shapes = {name: shape for partition in head[PARAM_SHAPES] for name, shape in partition.items()}
    for parameter in parameters:  # stage 3 writes flat tensors, and the other stages read named ones
        for state_name in ("fp32", "exp_avg", "exp_avg_sq"):
            value = peek(parameter / f"{state_name}.pt")
            if isinstance(value, Tensor):
                _write({PARAM: value.view(shapes[parameter.name])}, parameter / f"{state_name}.pt")


def _write(value: Any, path: Path) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    partial.replace(path)


def restore_hyperparameters(base: RoseAdamW, saved: Saved) -> None:
    """Each group's own: at stage 3 DeepSpeed gives every group the first one's."""
    groups = peek(saved.folder / "zero" / "optimizer_state.pt")[PARAM_GROUPS]
    for mine, theirs in zip(base.param_groups, groups, strict=True):
        mine.update({name: value for name, value in theirs.items() if name != "params"})


def frozen_and_buffers(engine: Any, saved: Saved, strict: bool) -> Callable[[], None]:
    """What restores the buffers and the parameters that do not train, which DeepSpeed's universal loader leaves alone.

    Raises:
        RefusedConfiguration: one of them is not in the checkpoint, and ``strict``.
    """
    heads = [head for head in map(peek, saved.model_files) if head["module"]]
    module, shapes = heads[0]["module"], heads[0].get(FROZEN_PARAM_SHAPES) or {}
    persistent = set(engine.module.state_dict())
    buffers = {name: buffer for name, buffer in engine.module.named_buffers() if name in persistent}
    frozen = {name: param for name, param in engine.module.named_parameters() if not param.requires_grad}
    missing = [name for name in (*buffers, *frozen) if name not in module and name not in shapes]
    if missing and strict:
        raise RefusedConfiguration(f"{saved.folder} has no {missing}: load_module_strict=False leaves them as they are")

    def whole(name: str) -> Tensor:
        if name not in shapes:
            tensor: Tensor = module[name]
            return tensor
        fragments = [head[FROZEN_PARAM_FRAGMENTS][name].reshape(-1) for head in heads]
        return torch.cat(fragments)[: shapes[name].numel()].view(shapes[name])

    @torch.no_grad()
    def restore() -> None:
        for name, buffer in buffers.items():
            if name not in missing:
                buffer.copy_(whole(name))
        for name, param in frozen.items():
            if name in missing:
                continue
            gathered = [param] if hasattr(param, "ds_id") else []
            with deepspeed.zero.GatheredParameters(gathered, modifier_rank=0, enabled=bool(gathered)):
                if not gathered or dist.get_rank() == 0:
                    param.copy_(whole(name))

    return restore
