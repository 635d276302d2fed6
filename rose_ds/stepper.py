"""One training step, the same for every engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from rose_ds.core.select import SecondOrderInputs, Selection, select
from rose_ds.engines.base import Engine, Forward, Loss
from rose_ds.engines.plain import PlainEngine
from rose_ds.objectives.divergence import symmetric_kl
from rose_ds.optimizer import Plan, RoseAdamW
from rose_ds.report import StepReport

logger = logging.getLogger(__name__)


class MicroBatch(TypedDict):
    """What ``Stepper.backward`` returns: detached values of this rank's micro-batch, in nats."""

    loss: Tensor
    kl: Tensor | None


def prepare(
    model: nn.Module,
    optimizer: RoseAdamW | None = None,
    *,
    accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
) -> Stepper:
    """Make a training step out of a model and its RoseAdamW, whatever runs the model.

    Args:
        model: an nn.Module on this process, or a DeepSpeedEngine (ZeRO 0 to 3).
        optimizer: the RoseAdamW over ``model.named_parameters()``; none for a DeepSpeedEngine, which has its own.
        accumulation_steps: micro-batches to an optimizer step; a DeepSpeedEngine has its own.
        max_grad_norm: clip the task gradient's global L2 norm to this; None or 0: no clipping. A DeepSpeedEngine has
            its own.

    Raises:
        RefusedConfiguration: a setting under which a gradient would silently be wrong.
        TypeError/ValueError: arguments that do not fit together.
    """
    return Stepper(_engine_for(model, optimizer, accumulation_steps, max_grad_norm))


def _engine_for(
    model: nn.Module, optimizer: RoseAdamW | None, accumulation_steps: int, max_grad_norm: float | None
) -> Engine:
    if isinstance(accumulation_steps, bool) or not isinstance(accumulation_steps, int) or accumulation_steps < 1:
        raise ValueError(f"{accumulation_steps=} must be an integer >= 1")
    if max_grad_norm is not None and not max_grad_norm >= 0:
        raise ValueError(f"{max_grad_norm=} must be >= 0, or None")
    if _is_a(model, "deepspeed.runtime.engine", "DeepSpeedEngine"):
        from rose_ds.engines.zero import ZeroEngine  # deepspeed is imported only where it is used

        if optimizer is not None or accumulation_steps != 1 or max_grad_norm is not None:
            raise ValueError(
                "prepare(deepspeed_engine) takes optimizer, accumulation and clipping from the engine: set them in the "
                "DeepSpeed config (optimizer, gradient_accumulation_steps, gradient_clipping)"
            )
        return ZeroEngine(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module or a DeepSpeedEngine, got {type(model).__name__}")
    if not isinstance(optimizer, RoseAdamW):
        raise TypeError(
            f"prepare(model, optimizer) needs RoseAdamW(model.named_parameters(), ...), got {type(optimizer).__name__}"
        )
    for module, cls in (
        ("torch.nn.parallel.distributed", "DistributedDataParallel"),
        ("torch.nn.parallel.data_parallel", "DataParallel"),
        ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"),
        ("torch.distributed.fsdp._fully_shard._fully_shard", "FSDPModule"),
    ):
        if any(_is_a(m, module, cls) for m in model.modules()):
            raise TypeError(f"{cls} is not supported by prepare(): use one process, or DeepSpeed for several")
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise TypeError(
            "a plain module in a job of several processes would train a separate model on each: pass the "
            "DeepSpeedEngine that deepspeed.initialize() returned"
        )
    return PlainEngine(model, optimizer, accumulation_steps, max_grad_norm)


def _is_a(model: object, module: str, cls: str) -> bool:
    return any(base.__module__ == module and base.__name__ == cls for base in type(model).__mro__)


class Stepper:
    """``backward()`` then ``step()`` for every micro-batch; made by ``prepare``."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.optimizer, self.config = engine, engine.optimizer, engine.optimizer.config
        self._awaiting_step = False
        self._selection: Selection | None = None

    @property
    def eligible(self) -> list[str]:
        """Names of the parameters that may be masked, in the model's order."""
        return self.engine.eligible

    def describe(self) -> str:
        """A readable list of what is masked and how."""
        eligible, config, shards = set(self.eligible), self.config, self.engine.shards
        lines = [
            f"ROSE {config.strategy} ({config.granularity}) on {self.engine.name}: {shards.tensor_count} tensors, "
            f"{shards.element_count:,} elements eligible; the rest is always updated"
        ]
        for name, param in self.engine.named_parameters():
            lines.append(f"  {'masked' if name in eligible else 'always'}  {self.engine.numel(param):>12,}  {name}")
        return "\n".join(lines)

    def backward(self, forward: Forward, loss: Loss) -> MicroBatch:
        """Gradients of one micro-batch on this rank.

        Args:
            forward: runs the model on this rank's micro-batch and returns the logits, (batch, ..., classes). Called
                twice by first-order strategies, once more by ZeRO-3 with the first pass's random numbers.
            loss: scalar mean loss of the first pass's logits; its gradient is what updates the weights.

        Returns:
            The loss and, where a KL gradient was taken, the divergence between the two passes.

        Raises:
            RuntimeError: ``step()`` was not called after the last ``backward()``, or two passes gave identical logits
                under a first-order strategy (no dropout).
        """
        if self._awaiting_step:
            raise RuntimeError("call step() after every backward(), also off the accumulation boundary")
        needs_kl = self.config.uses_first and not self._warming_up()
        losses = self.engine.backward(_checked(forward), loss, symmetric_kl if needs_kl else None)
        self._awaiting_step = True
        return {"loss": losses.loss, "kl": losses.kl}

    def step(self) -> StepReport | None:
        """Count the micro-batch; at the accumulation boundary update the weights and zero the gradients.

        Returns None off the boundary. A step with a gradient that is not finite, on any rank, changes nothing and is
        reported as skipped.
        """
        if not self._awaiting_step:
            raise RuntimeError("step() must follow a backward()")
        self._awaiting_step = False
        self._selection = None
        try:
            outcome = self.engine.step(self._plan)
        finally:
            self.optimizer.plan = None
        if outcome is None:
            return None
        self.engine.take_kl_grads()
        report = self._report(outcome.grad_norm, outcome.skipped)
        if report.skipped:
            logger.warning("a gradient was not finite: nothing was updated (after %d steps)", report.step)
        return report

    def gather_parameters(self) -> dict[str, Tensor]:
        """Full fp32 parameters by their unwrapped names, on every rank: a collective, for models that fit."""
        return self.engine.gather_parameters()

    def _warming_up(self) -> bool:
        return self.optimizer.steps_taken() < self.config.mask_warmup_steps

    def _plan(self, grads: Sequence[Tensor], grad_norm: float | None) -> None:
        """Called by the engine once a step, when gradients are reduced and clipped and nothing is updated yet."""
        kl_grads = self.engine.take_kl_grads()
        if grad_norm is not None and not torch.isfinite(torch.tensor(grad_norm)):
            self.optimizer.plan = Plan(skip=True)
            return
        if self.config.strategy == "none" or self._warming_up():
            self.optimizer.plan = Plan()
            return
        if self.config.uses_first and kl_grads is None:
            raise RuntimeError("the step has no KL gradient: every micro-batch must go through Stepper.backward()")
        second = self._second_order_inputs(grads) if self.config.uses_second else None
        selection = select(self.config, self.engine.shards, kl_grads, second)
        self._selection = selection
        self.optimizer.plan = Plan(selection.codes) if selection.finite else Plan(skip=True)

    def _second_order_inputs(self, grads: Sequence[Tensor]) -> SecondOrderInputs:
        exp_avgs, beta1s = [], []
        beta1_of = self.engine.beta1_of()
        for piece in self.engine.slices:
            exp_avgs.append(piece.view(self.optimizer.init_state(piece.param)["exp_avg"]))
            beta1s.append(beta1_of[piece.param])
        return SecondOrderInputs(grads, exp_avgs, beta1s)

    def _report(self, grad_norm: float | None, skipped: bool) -> StepReport:
        shards, found = self.engine.shards, self._selection
        per_element = self.config.granularity == "element"
        masks: dict[str, Any] = {}
        if found is not None:
            for which, threshold in (("first", found.first), ("second", found.second)):
                if threshold is not None:
                    masks[f"tau_{which}"] = threshold.value
                    masks[f"kept_{which}"] = threshold.kept
                    masks[f"kept_{which}_per_rank"] = threshold.kept_per_rank if per_element else None
        return StepReport(
            step=self.optimizer.steps_taken(),
            eligible=shards.element_count if per_element else shards.tensor_count,
            grad_norm=grad_norm,
            skipped=skipped,
            **masks,
        )


def _checked(forward: Forward) -> Forward:
    def run() -> Tensor:
        logits = forward()
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"forward() must return the logits tensor, got {type(logits).__name__}; for a Hugging Face model: "
                "lambda: model(**inputs).logits"
            )
        return logits

    return run
