"""RoseAdamW: AdamW that updates only what a plan lets it."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rose_ds.config import RoseConfig
from rose_ds.core.layout import Block
from rose_ds.core.mask import BitMask
from rose_ds.core.select import Rule
from rose_ds.core.update import UpdateBatch
from rose_ds.objectives import Objective, Task, resolve

logger = logging.getLogger(__name__)

#: Options of torch.optim.AdamW that change the mathematics or the execution; each is refused unless at its default.
_REFUSED = {
    "amsgrad": "ROSE's update (Algorithm 1) has no maximum over second moments",
    "maximize": "negate the loss instead",
    "capturable": "a step reads its thresholds on the host and cannot be captured in a CUDA graph",
    "differentiable": "the masks are not differentiable",
}


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank: a DTensor's shard, sharing its memory; any other tensor itself."""
    shard: Tensor = getattr(tensor, "_local_tensor", tensor)  # DTensor.to_local() without its autograd
    return shard


class Slice(NamedTuple):
    """A contiguous piece of a named tensor, and where it lies in a tensor that the optimizer holds."""

    name: str
    tensor_index: int
    """Number of the named tensor among the model's eligible tensors."""
    param: Tensor
    """The tensor in ``param_groups``: the parameter itself, or a flat partition of many."""
    offset: int
    numel: int
    block: Block
    """Where the piece lies in the whole named tensor."""

    def view(self, like_param: Tensor) -> Tensor:
        """This slice of a tensor that is shaped and sharded like ``param`` (its gradient, exp_avg, ...), 1-D."""
        return local(like_param).detach().view(-1).narrow(0, self.offset, self.numel)

    def grad(self) -> Tensor:
        """This slice of ``param.grad``, 1-D; zeros for a parameter without one."""
        if self.param.grad is None:
            return torch.zeros(self.numel, device=self.param.device)
        return self.view(self.param.grad)


@dataclass(frozen=True)
class Plan:
    """What the next step does: ``codes`` are masks aligned with the attached slices (None: no mask)."""

    codes: list[Tensor] | list[BitMask] | list[int] | None = None
    skip: bool = False
    values: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    """Of the mask, for codes 0 to 3."""
    rule: Rule = "robust"
    scales: Sequence[float] | None = None
    """A factor for each slice's mask values."""


class RoseAdamW(torch.optim.Optimizer):
    """AdamW with ROSE's masks (Algorithm 1). Train through ``rose_ds.prepare``, which computes them each step.

    Args:
        params: ``model.named_parameters()``, or parameter groups whose ``params`` are (name, parameter) pairs, each
            group with its own lr, betas, eps, weight_decay if it likes. Unnamed parameters are accepted where an engine
            names them later (DeepSpeed).
        lr, betas, eps, weight_decay: as torch.optim.AdamW's.
        foreach, fused: which of torch's kernels updates the parameters that are not masked; False for either: its loop
            over tensors. By default the fused one on accelerators; on CPUs ``rose_ds.kernels``, or the loop where those
            are not taken: torch's ``fused=True`` rounds by an element's place in memory there, and a run then depends,
            in the last bit, on the number of ranks.
        objective: what ``rose_ds.prepare`` trains on unless told otherwise: a name such as "r-drop", or an object with
            a name and constants. It is here so that a DeepSpeed JSON can carry it.
        rose: the fields of RoseConfig as flat keywords, so that a DeepSpeed JSON can carry them.

    Raises:
        ValueError/TypeError: a bad value, an unknown keyword, or an option of torch's AdamW that ROSE cannot honour.
    """

    kernels: Any | None = None
    """Compiled ones, where all ranks have them (``rose_ds.kernels``); not of copies."""
    zeroed = False
    """Gradients were dropped since somebody last set this to False."""
    loaded = False
    """The same of a state that was loaded."""
    trained_objective: Objective | None = None
    """A stepper's, which a checkpoint records; ``objective`` is what one trains on unless it is told otherwise."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        objective: str | Mapping[str, Any] | Objective = "task",
        **rose: Any,
    ) -> None:
        _refuse_options(rose)
        rose = {name: value for name, value in rose.items() if name not in _REFUSED}
        self.config = RoseConfig.from_mapping(rose)
        for name in self.config.ignored():
            logger.warning(
                "%s=%r means nothing to strategy=%r, and is not looked at",
                name,
                getattr(self.config, name),
                self.config.strategy,
            )
        self.objective = resolve(objective)
        betas = tuple(betas) if isinstance(betas, list) else betas  # type: ignore[assignment]  # JSON has lists
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=foreach, fused=fused)
        super().__init__(params, defaults)
        self.plan: Plan | None = None
        self._slices: list[Slice] = []
        self._slices_of: dict[Tensor, list[int]] = {}
        register_with_deepspeed()

    def attach(self, slices: list[Slice]) -> None:
        """Say which pieces of which eligible tensors lie in this process's ``param_groups``."""
        self._slices = slices
        self._slices_of = {}
        for i in sorted(range(len(slices)), key=lambda i: slices[i].offset):
            self._slices_of.setdefault(slices[i].param, []).append(i)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; what the constructor refuses of a group is refused here."""
        super().add_param_group(param_group)
        try:
            _check_hyperparameters(self.param_groups[-1])
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which compares only the groups' sizes; a state that does not fit its parameter is refused whole.

        Raises:
            ValueError: names the parameter's position, and what is missing or has another shape; or the state was made
                with an option of torch's AdamW that ROSE cannot honour.
        """
        for group in state_dict["param_groups"]:  # others say how a step was made, not which
            _refuse_options({name: group.get(name) for name in ("amsgrad", "maximize")})
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        held = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved, held, strict=False):  # torch refuses other counts
            state = state_dict["state"].get(index)
            if state:
                _check_state(index, state, param)
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].cpu()  # read every step; a checkpoint may have come by way of a GPU
        self.loaded = True

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps what it knows; a copy has no engine yet, so it is attached to nothing and has no plan
        return {**super().__getstate__(), "config": self.config, "objective": self.objective}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("plan", None)
        self.__dict__.setdefault("_slices", [])
        self.__dict__.setdefault("_slices_of", {})
        for group in self.param_groups:
            group.setdefault("foreach", None)
            group.setdefault("fused", None)

    # --- what the step needs to know ---

    def init_state(self, param: Tensor) -> dict[str, Any]:
        """This parameter's state, created as zeros where it is not there yet."""
        state = self.state[param]
        if "exp_avg" not in state:
            # DeepSpeed's and torch's checkpoint tools know these three names
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(param, requires_grad=False, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, requires_grad=False, memory_format=torch.preserve_format)
        return state

    def steps_taken(self) -> int:
        """Optimizer steps so far, from the state: survives a checkpoint."""
        return max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)

    @property
    def needs_plan(self) -> bool:
        """Whether every step must be planned by a stepper: it makes masks, or its objective is more than the loss."""
        return self.config.strategy != "none" or not isinstance(self.trained_objective, Task | None)

    @property
    def skips(self) -> bool:
        """Whether the plan leaves everything as it is."""
        return self.plan is not None and self.plan.skip

    # --- the step ---

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Torch's, which a stepper notices: what it kept apart for these gradients goes too."""
        super().zero_grad(set_to_none)
        self.zeroed = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient, by the plan where there is one.

        Without a plan, strategy="none" is plain AdamW, where no stepper has another objective. For the others, a step
        whose gradients are all zero only creates the state (checkpoint libraries and DeepSpeed take such steps at the
        start); any other would silently train without masks and raises RuntimeError.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = self.plan
        if plan is None:
            if self.needs_plan:
                if self._create_state_if_all_zero():
                    return loss
                raise RuntimeError(
                    f"RoseAdamW(strategy={self.config.strategy!r}).step() has "
                    f"{'no masks for' if self.config.strategy != 'none' else 'not the objective of'} this step: train "
                    "through stepper = rose_ds.prepare(...); stepper.backward(forward, loss); stepper.step(). A "
                    "Trainer's own training_step() must call super()'s"
                )
            plan = Plan()
        if not plan.skip:
            for group in self.param_groups:
                self._step_group(group, plan)
        return loss

    def _create_state_if_all_zero(self) -> bool:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(local(p.grad).count_nonzero() for p in params if p.grad is not None):
            return False
        for param in params:
            self.init_state(param)
        return True

    def _step_group(self, group: dict[str, Any], plan: Plan) -> None:
        batches: dict[int, UpdateBatch] = {}
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise RuntimeError("RoseAdamW does not support sparse gradients: use Embedding(sparse=False)")
            state = self.init_state(param)
            # not in place: DeepSpeed's checkpoint loader shares one step tensor between partitions
            state["step"] = state["step"] + 1
            step = int(state["step"])
            batch = batches.get(step)
            if batch is None:
                batch = batches[step] = UpdateBatch(group, step, plan.values, plan.rule, self.kernels)
            for code, views, scale in self._segments(param, state, plan):
                batch.add(code, views, scale)
        for batch in batches.values():
            batch.flush()

    def _segments(
        self, param: Tensor, state: dict[str, Any], plan: Plan
    ) -> Iterator[tuple[Tensor | BitMask | int, tuple[Tensor, ...], float]]:
        """Cut a parameter into (mask code, views of it, its gradient and moments, factor); code 3 is a mask of ones."""
        assert param.grad is not None
        whole = tuple(local(t) for t in (param, param.grad, state["exp_avg"], state["exp_avg_sq"]))
        indices = self._slices_of.get(param, []) if plan.codes is not None else []
        if not indices:
            yield 3, whole, 1.0
            return
        covers = self._slices[indices[0]].numel == whole[0].numel()  # nothing is cut, so no views are made
        flat = whole if covers else tuple(t.view(-1) for t in whole)
        end = 0
        for i in indices:
            offset, numel = self._slices[i].offset, self._slices[i].numel
            if offset > end:
                yield 3, tuple(t[end:offset] for t in flat), 1.0
            scale = 1.0 if plan.scales is None else plan.scales[i]
            mine = flat if covers else tuple(t[offset : offset + numel] for t in flat)
            yield plan.codes[i], mine, scale  # type: ignore[index]
            end = offset + numel
        if end < whole[0].numel():
            yield 3, tuple(t[end:] for t in flat), 1.0


def _check_state(index: Any, state: dict[str, Any], param: Tensor) -> None:
    missing = [name for name in ("step", "exp_avg", "exp_avg_sq") if name not in state]
    if missing:
        raise ValueError(f"the saved optimizer state of parameter {index} has no {', '.join(missing)}")
    for name in ("exp_avg", "exp_avg_sq"):
        moment = state[name]
        if not isinstance(moment, Tensor) or local(moment).shape != local(param).shape:
            found = tuple(local(moment).shape) if isinstance(moment, Tensor) else type(moment).__name__
            raise ValueError(
                f"the saved {name} of parameter {index} is {found}, the parameter {tuple(local(param).shape)}: the "
                "checkpoint is of another model, or sharded differently"
            )
    step = state["step"]
    if isinstance(step, Tensor) and step.numel() == 1:
        step = step.item()
    if not isinstance(step, (int, float)) or not 0 <= step < math.inf:
        raise ValueError(f"the saved step of parameter {index} is {step!r}, not a count")


def _refuse_options(given: Mapping[str, Any]) -> None:
    for option, reason in _REFUSED.items():
        if given.get(option):
            raise ValueError(f"RoseAdamW does not support {option}: {reason}")


def _check_hyperparameters(group: dict[str, Any]) -> None:
    """Raise ValueError or TypeError, naming the setting; integers become floats, whatever their size."""
    _refuse_options(group)
    for name in ("lr", "eps", "weight_decay"):
        if not (name == "lr" and isinstance(group["lr"], Tensor)):
            group[name] = _number(name, group[name])
        if float(group[name]) < 0:
            raise ValueError(f"{name}={group[name]!r} must be >= 0")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{betas=} must be two numbers in [0, 1)")
    group["betas"] = tuple(_number("betas", beta) for beta in betas)
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"{betas=} must be two numbers in [0, 1)")
    for name in ("foreach", "fused"):
        if not (group[name] is None or isinstance(group[name], bool)):
            raise TypeError(f"{name}={group[name]!r} must be true, false or null")
    if group["foreach"] and group["fused"]:
        raise ValueError("foreach and fused are two kernels: leave one of them out")
    unknown = sorted(set(RoseConfig.field_names()) & set(group))
    if unknown:
        raise ValueError(f"{unknown} in a parameter group: ROSE's settings hold for the whole model, as keywords")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}={value!r:.40} must be finite")
    return number


def register_with_deepspeed() -> None:
    """Make ``"optimizer": {"type": "RoseAdamW"}`` resolve in a DeepSpeed config.

    DeepSpeed looks other names up in torch.optim, and asks its ZeRO optimizers for an exact match in a list. Called on
    import and again whenever a RoseAdamW is built, since deepspeed may be imported after rose_ds.
    """
    torch.optim.RoseAdamW = RoseAdamW  # type: ignore[attr-defined]
    zero_utils = sys.modules.get("deepspeed.runtime.zero.utils")
    if zero_utils is not None and RoseAdamW not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
        zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(RoseAdamW)
