"""One training step, the same for every engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from rose_ds.core.select import SecondOrderInputs, Selection, select
from rose_ds.engines.base import Engine, Forward, Loss, RefusedConfiguration
from rose_ds.engines.plain import PlainEngine
from rose_ds.exchange import explaining_lost_ranks
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
        model: an nn.Module on this process; what DistributedDataParallel, FullyShardedDataParallel or fully_shard made
            of one (also through accelerate or torch.compile); or a DeepSpeedEngine (ZeRO 0 to 3).
        optimizer: the RoseAdamW over ``model.named_parameters()``, built after sharding; none for a DeepSpeedEngine,
            which has its own.
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
    engine_class = _engine_class(_uncompiled(model))
    return engine_class(_uncompiled(model), _rose_optimizer(optimizer), accumulation_steps, max_grad_norm)


def _engine_class(model: nn.Module) -> Callable[[Any, RoseAdamW, int, float | None], Engine]:
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
        from rose_ds.engines.ddp import DdpEngine

        return DdpEngine
    if wrapper == "FullyShardedDataParallel":
        from rose_ds.engines.fsdp1 import Fsdp1Engine

        return Fsdp1Engine
    if wrapper == "FSDPModule":
        from rose_ds.engines.fsdp2 import Fsdp2Engine

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
    return PlainEngine


#: Classes of torch that run or are another module. Looked up by name: importing FSDP takes a second.
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "ReplicateModule", "FSDPModule")


def _wrapper_of(module: nn.Module) -> str | None:
    return next((name for name in _WRAPPERS if _is_a(module, "torch.", name)), None)


def _uncompiled(model: nn.Module) -> nn.Module:
    while _is_a(model, "torch.", "OptimizedModule"):
        model = model._orig_mod  # type: ignore[assignment]
    return model


def _rose_optimizer(optimizer: Any) -> RoseAdamW:
    """The RoseAdamW itself, also from inside accelerate's AcceleratedOptimizer."""
    inner = optimizer
    while not isinstance(inner, RoseAdamW) and hasattr(inner, "optimizer"):
        if getattr(inner, "scaler", None) is not None:
            raise RefusedConfiguration(
                'mixed_precision="fp16" scales the loss outside rose_ds: use "bf16", or fp16 through DeepSpeed'
            )
        inner = inner.optimizer
    if not isinstance(inner, RoseAdamW):
        raise TypeError(
            f"prepare(model, optimizer) needs RoseAdamW(model.named_parameters(), ...), got {type(optimizer).__name__}"
        )
    return inner


def _is_a(model: object, package: str, cls: str) -> bool:
    return any(base.__module__.startswith(package) and base.__name__ == cls for base in type(model).__mro__)


class Stepper:
    """``backward()`` then ``step()`` for every micro-batch; made by ``prepare``."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.optimizer, self.config = engine, engine.optimizer, engine.optimizer.config
        self.last_report: StepReport | None = None
        """The last optimizer step's report."""
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
                twice by first-order strategies, once more by ZeRO-3 and FSDP1 with the first pass's random numbers.
            loss: scalar mean loss of the first pass's logits; its gradient is what updates the weights.

        Returns:
            The loss and, where a KL gradient was taken, the divergence between the two passes.

        Raises:
            RuntimeError: ``step()`` was not called after the last ``backward()``, or two passes gave identical logits
                under a first-order strategy (no dropout).
            RankLost: another rank died, or made fewer calls.
        """
        if self._awaiting_step:
            raise RuntimeError("call step() after every backward(), also off the accumulation boundary")
        needs_kl = self.config.uses_first and not self._warming_up()
        with explaining_lost_ranks(self._next_step):
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
            with explaining_lost_ranks(self._next_step):
                outcome = self.engine.step(self._plan)
        finally:
            self.optimizer.plan = None
        if outcome is None:
            return None
        self.engine.take_kl_grads()
        return self._report(outcome.grad_norm, outcome.skipped)

    def leave_step_to_optimizer(self, *, last: bool, grad_norm: Callable[[], float | None] = lambda: None) -> None:
        """Instead of ``step()``, in loops that clip and call ``optimizer.step()`` themselves (transformers.Trainer).

        Call after every ``backward()``. After the ``last`` micro-batch, the masks are made when the optimizer steps,
        from the gradients it then holds; ``last_report`` tells of it. ``grad_norm`` gives the norm that the loop found:
        where it is not finite the step changes nothing.
        """
        if not self._awaiting_step:
            raise RuntimeError("leave_step_to_optimizer() must follow a backward()")
        self._awaiting_step = False
        if last:

            def begin(*_: object) -> None:
                self._plan(self.engine.slice_grads(), grad_norm())

            def finish(*_: object) -> None:
                before.remove()
                after.remove()
                skipped = self.optimizer.skips
                self.optimizer.plan = None
                self.engine.take_kl_grads()
                self._report(grad_norm(), skipped)

            before = self.optimizer.register_step_pre_hook(begin)
            after = self.optimizer.register_step_post_hook(finish)

    def gather_parameters(self) -> dict[str, Tensor]:
        """Full fp32 parameters by their unwrapped names, on every rank: a collective, for models that fit."""
        return self.engine.gather_parameters()

    def _next_step(self) -> str:
        return f"optimizer step {self.optimizer.steps_taken() + 1}"

    def _warming_up(self) -> bool:
        return self.optimizer.steps_taken() < self.config.mask_warmup_steps

    def _plan(self, grads: Sequence[Tensor], grad_norm: float | None, scale: Tensor | float = 1.0) -> None:
        """Called by the engine once a step, when gradients are reduced and nothing is updated yet; see Planner."""
        self._selection = None
        kl_grads = self.engine.take_kl_grads()
        if grad_norm is not None and not torch.isfinite(torch.tensor(grad_norm)):
            self.optimizer.plan = Plan(skip=True)
            return
        if self.config.strategy == "none" or self._warming_up():
            self.optimizer.plan = Plan()
            return
        if self.config.uses_first and kl_grads is None:
            raise RuntimeError("the step has no KL gradient: every micro-batch must go through Stepper.backward()")
        second = self._second_order_inputs(grads, scale) if self.config.uses_second else None
        selection = select(self.config, self.engine.shards, kl_grads, second)
        self._selection = selection
        self.optimizer.plan = Plan(selection.codes) if selection.finite else Plan(skip=True)

    def _second_order_inputs(self, grads: Sequence[Tensor], scale: Tensor | float) -> SecondOrderInputs:
        exp_avgs, beta1s = [], []
        beta1_of = self.engine.beta1_of()
        for piece in self.engine.slices:
            exp_avgs.append(piece.view(self.optimizer.init_state(piece.param)["exp_avg"]))
            beta1s.append(beta1_of[piece.param])
        return SecondOrderInputs(grads, exp_avgs, beta1s, scale)

    def _report(self, grad_norm: float | None, skipped: bool) -> StepReport:
        shards, found = self.engine.shards, self._selection
        self._selection = None  # or its masks would be there during the next backward pass
        per_element = self.config.granularity == "element"
        masks: dict[str, Any] = {}
        if found is not None:
            for which, threshold in (("first", found.first), ("second", found.second)):
                if threshold is not None:
                    masks[f"tau_{which}"] = threshold.value
                    masks[f"kept_{which}"] = threshold.kept
                    masks[f"kept_{which}_per_rank"] = threshold.kept_per_rank if per_element else None
        report = self.last_report = StepReport(
            step=self.optimizer.steps_taken(),
            eligible=shards.element_count if per_element else shards.tensor_count,
            grad_norm=grad_norm,
            skipped=skipped,
            **masks,
        )
        if skipped:
            logger.warning("a gradient was not finite: nothing was updated (after %d steps)", report.step)
        return report


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
