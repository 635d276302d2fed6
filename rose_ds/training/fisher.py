"""Child-Tuning_D's Fisher information: the mean squared gradient of the task loss."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from rose_ds.core.risk import squared_norms
from rose_ds.engines.base import Engine
from rose_ds.engines.batch import PassBatch
from rose_ds.engines.passes import Forward, Loss

logger = logging.getLogger(__name__)


def mean_squared_gradient(
    engine: Engine,
    batches: Iterable[tuple[Forward, Loss]],
    max_grad_norm: float | None,
) -> list[Tensor]:
    """One fp32 1-D tensor a slice. Each batch's gradient is reduced over the ranks first and then squared: squares of
    each rank's own gradient, or the square of an accumulated one, rank other parameters highest. A batch whose gradient
    is not finite, on any rank, does not count.

    Raises:
        ValueError: there is no batch.
        FloatingPointError: none has a finite gradient.
    """
    total, count = [torch.zeros(piece.numel, device=piece.param.device) for piece in engine.slices], 0
    left_out = 0
    for forward, loss in batches:
        try:
            with engine.micro_batch():
                batch = PassBatch(engine, forward, loss)
                batch.moved_statistics = True  # nothing is trained
                a = batch.run()
                batch.pull_apart(batch.loss(a) * engine.accumulation_steps, (a,))
        except BaseException as error:
            engine.abandon(error)
            raise
        grads = engine.take_risk_grads() or []
        if not engine.agree(all(bool(grad.isfinite().all()) for grad in grads)):
            left_out += 1
            continue
        if max_grad_norm:
            _clip_each(engine, grads, max_grad_norm)
        for sums, grad in zip(total, grads, strict=True):
            sums.addcmul_(grad, grad)
        count += 1
    if left_out and not count:
        raise FloatingPointError(
            f"the gradient of every batch of the Fisher pass ({left_out}) is inf or NaN: in fp16 begin with a lower "
            'loss scale ("initial_scale_power" in "fp16"), or use bf16; otherwise look at the model and its data'
        )
    if left_out:
        logger.warning("the Fisher pass left %d batches out, whose gradient is inf or NaN", left_out)
    if count == 0:
        raise ValueError("the Fisher pass was given no batch")
    return [sums / count for sums in total]


def _clip_each(engine: Engine, grads: list[Tensor], max_norm: float) -> None:
    """Each named tensor's gradient by its own L2 norm over all ranks, in place."""
    layout = engine.layout
    norms = layout.over_ranks(
        lambda mine: squared_norms(
            [grads[i] for i in mine], [layout.tensor_index[i] for i in mine], layout.tensor_count
        )
    ).sqrt()
    for i, grad in enumerate(grads):
        grads[i] = grad * min(1.0, max_norm / (float(norms[layout.tensor_index[i]]) + 1e-6))
