"""What all ranks of an engine must have alike: kernels, and accelerators that thresholds are found on."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from rose_ds.engines.base import Engine
from rose_ds.kernels import kernels_for
from rose_ds.optimizer import local

logger = logging.getLogger(__name__)


def agreed_kernels(engine: Engine, *, masks: bool = True) -> Any | None:
    """Compiled kernels for the engine's optimizer, which has ``masks`` or none, on all ranks or on none: they and torch
    round parameters that are never masked otherwise, and replicas must not drift apart. A collective.

    Raises:
        ValueError/RuntimeError: ROSE_DS_KERNELS asks for what cannot be.
    """
    found, problem = None, None
    try:
        elements = engine.layout.element_count if masks else engine.trainable_count()
        found = kernels_for(elements, _held(engine), masks=masks, devices=_devices(engine))
    except Exception as error:  # whatever it is: the others wait for this rank's answer
        problem = error
    everywhere = engine.agree(found is not None)
    if problem is not None:
        raise problem
    if found is not None and not everywhere:
        logger.warning("another rank has no kernels (its log says why): the optimizer step runs without on all ranks")
    return found if everywhere else None


def agreed_accelerator(engine: Engine) -> torch.device | None:
    """The accelerator that holds what this rank's optimizer updates, where every rank has one; else None. All must
    agree, as ranks exchange other counts where thresholds are found on accelerators. A collective.
    """
    devices = _devices(engine)
    found = devices.pop() if len(devices) == 1 else None
    # what triton interprets counts, though it is on a CPU
    there = found is not None and (found.type != "cpu" or hasattr(engine.optimizer.kernels, "risks_on_device"))
    return found if engine.agree(there) else None


def _devices(engine: Engine) -> set[torch.device]:
    """Of what this rank's optimizer updates; of the module, on a rank that holds nothing."""
    return {tensor.device for tensor in _held(engine) or map(local, engine.module.parameters())}


def _held(engine: Engine) -> list[Tensor]:
    """What the optimizer updates of this rank; ZeRO-3 shows it its partitions during a step alone."""
    in_groups = [p for group in engine.optimizer.param_groups for p in group["params"]]
    return [local(p) for p in (*in_groups, *(piece.param for piece in engine.slices))]
