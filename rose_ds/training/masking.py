"""What the masks of a step are: decided when its gradients are reduced and nothing is updated yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rose_ds.core.magnitudes import StepInputs
from rose_ds.core.mask import FIRST, BitMask
from rose_ds.core.select import Selection, kept_by_tensor, select
from rose_ds.engines.agreed import agreed_accelerator, agreed_kernels
from rose_ds.engines.base import Engine
from rose_ds.masks import MaskPolicy
from rose_ds.optimizer import Plan
from rose_ds.training.halves import Halves
from rose_ds.training.loop_watch import all_finite
from rose_ds.training.mask_record import MaskRecorder
from rose_ds.training.method_state import MethodState

#: Steps without any risk with which a run that goes on may begin.
_PATIENCE = 8


class Masking:
    """Ranks an engine's gradients and leaves a plan to its optimizer.

    Args:
        policy: None: no parameter is masked.
        tell: warns of something once a run: what, and in which words.
        halves: what first-order risk is found from instead of a second pass, where it is.
    """

    def __init__(
        self,
        engine: Engine,
        policy: MaskPolicy | None,
        state: MethodState,
        tell: Callable[[str, str], None],
        halves: Halves | None = None,
    ) -> None:
        self.engine, self.optimizer, self.config = engine, engine.optimizer, engine.optimizer.config
        self.policy, self.state, self._tell, self.halves = policy, state, tell, halves
        self.recorder: MaskRecorder | None = None
        """Sees each step's masks before they are used, where there is one."""
        self.selection: Selection | None = None
        """Of the step under way, once it is decided."""
        self._without_risk: int | None = 0
        """Steps whose first-order risk was zero everywhere; None: one had some."""
        self._used: list[BitMask] = []
        """Masks of the last step whose memory the next one takes: bits alone, which are few."""
        self.optimizer.kernels = agreed_kernels(engine, masks=policy is not None)
        self._accelerator = agreed_accelerator(engine) if policy is not None else None

    @property
    def needs_fisher_pass(self) -> bool:
        """Whether a mask is still to be found before training."""
        return self.policy is not None and self.policy.fisher and self.state.selection is None

    def find_once(self, fisher: Sequence[Tensor]) -> None:
        """The mask of the whole run, from the mean squared gradient of the task loss."""
        assert self.policy is not None
        inputs = self._inputs(fisher, fisher)
        self.state.selection = select(self.policy.selectors, self.config.granularity, inputs, histograms=True)

    def ranks_now(self) -> bool:
        """Whether the step under way makes a new mask."""
        return (
            self.policy is not None
            and self.state.selection is None
            and self.optimizer.steps_taken() >= self.config.mask_warmup_steps
        )

    def finds_risk_now(self) -> bool:
        """Whether the step under way looks for first-order risk, where a mask ranks it."""
        return self.state.risk is None or self.state.risk.due(self.optimizer.steps_taken())

    def decide(
        self, grads: Sequence[Tensor], grad_norm: float | None, scale: Tensor | float = 1.0, clip: float = 1.0
    ) -> None:
        """Called by the engine once a step, when gradients are reduced and nothing is updated yet; see Decision."""
        self.selection = None
        risk_grads, share = self.engine.take_risk_grads(), self.engine.share
        self.engine.share = 0.0
        if grad_norm is not None and not torch.isfinite(torch.tensor(grad_norm)):
            self.optimizer.plan = Plan(skip=True)
            return
        policy = self.policy
        if policy is None or self.optimizer.steps_taken() < self.config.mask_warmup_steps:
            self.optimizer.plan = Plan()
            return
        risk = self.state.risk
        if policy.ranks_risk and self.finds_risk_now():
            if self.halves is not None:
                self.halves.check_there(there=risk_grads is not None)
                if risk_grads is not None:
                    self.halves.difference(risk_grads, grads, float(scale) / clip)
                elif risk is None or risk.values is None:
                    self._tell("alone", "a step of one micro-batch has no halves to compare: it updated everything")
                    self.optimizer.plan = Plan()
                    return
            elif risk_grads is None:
                raise RuntimeError(
                    "the step has no gradient to rank: every micro-batch must go through Stepper.backward()"
                )
        if risk is not None:
            risk_grads = risk.values if risk_grads is None else risk.with_new(risk_grads)
        if self.needs_fisher_pass:
            raise RuntimeError(
                f"strategy={self.config.strategy!r} finds its mask before training: call stepper.fisher_pass(batches), "
                "or load_state() of the run that is resumed (RoseTrainer and rose-ds train do)"
            )
        selection = self.state.selection
        if selection is None:
            if share and risk_grads is not None and not policy.ranks_risk and not self._all_finite(risk_grads):
                self.optimizer.plan = Plan(skip=True)  # on all ranks
                return
            inputs = self._inputs(grads, risk_grads, scale=scale, share=share, clip=clip)
            recorded = policy.refresh == "once" or (self.recorder is not None and self.recorder.due(inputs.step))
            selection = select(
                policy.selectors,
                self.config.granularity,
                inputs,
                self.optimizer.kernels,
                histograms=recorded,
                device=self._accelerator,
                used=self._used,
            )
            self._used = [code for code in selection.codes if isinstance(code, BitMask)]
            if policy.refresh == "once":
                self.state.selection = selection
        self.selection = selection
        self._check_zeros(selection)
        if not selection.finite:
            self.optimizer.plan = Plan(skip=True)
            return
        if risk is not None:
            risk.values = risk_grads
        scales = self._scales(selection) if policy.preserve_scale else None
        self.optimizer.plan = Plan(selection.codes, values=policy.values, rule=policy.rule, scales=scales)
        if self.recorder is not None:
            self.recorder.see(self.optimizer.steps_taken() + 1, selection)

    def _all_finite(self, grads: Sequence[Tensor]) -> bool:
        """On every rank. What is kept apart with another weight may overflow where their sum does not."""
        return self.engine.agree(all_finite(grads))

    def _check_zeros(self, selection: Selection) -> None:
        """A gradient that is zero everywhere ranks nothing: an error where a run begins so."""
        risk, layout = selection.thresholds.get(FIRST), self.engine.layout
        if self.policy is None or not self.policy.ranks_risk or risk is None or not selection.finite:
            return
        per_element = self.config.granularity == "element"
        if risk.zeros < (layout.element_count if per_element else layout.tensor_count):
            self._without_risk = None
            return
        by_chance = self.engine.agree(self.engine.equal_passes > 0)  # of which two passes are judged by themselves
        if self._without_risk is not None:
            self._without_risk += not by_chance
        goes_on = self.optimizer.steps_taken() > self.config.mask_warmup_steps
        if not self._without_risk or by_chance or (goes_on and self._without_risk < _PATIENCE):
            self._tell("zero", "first-order risk is zero everywhere: every parameter was kept")
        elif self.halves is not None:
            raise RuntimeError(
                "the gradients of the two halves of a step are equal everywhere, so the mask would keep everything: "
                "are they the same rows, without dropout, or are the eligible parameters not used by the loss?"
            )
        else:
            raise RuntimeError(
                "the gradient of the divergence between two passes is zero for every eligible parameter, so the mask "
                "would keep all of them: the eligible parameters are hidden from the graph (computed under no_grad, "
                "detached, in a custom or reentrant checkpoint), are not used by the logits, or the gradient is too "
                "small for the precision (LoRA, whose second matrix starts at 0: mask_warmup_steps=1)"
            )

    def _inputs(self, grads: Sequence[Tensor], risk_grads: Sequence[Tensor] | None, **multipliers: Any) -> StepInputs:
        slices, beta1_of = self.engine.slices, self.engine.beta1_of()
        return StepInputs(
            self.engine.layout,
            grads,
            exp_avgs=[piece.view(self.optimizer.init_state(piece.param)["exp_avg"]) for piece in slices]
            if self.policy is not None and self.policy.ranks_momentum
            else [],
            weights=[piece.view(piece.param) for piece in slices],
            beta1s=[beta1_of[piece.param] for piece in slices],
            risk_grads=risk_grads,
            step=self.optimizer.steps_taken() + 1,
            seed=self.config.mask_seed,
            **multipliers,
        )

    def _scales(self, selection: Selection) -> list[float]:
        layout = self.engine.layout
        kept = kept_by_tensor(layout, selection.codes).tolist()  # type: ignore[arg-type]  # by element
        sizes = [math.prod(block.shape) for block in layout.blocks]
        return [size / (kept[i] + 1) for size, i in zip(sizes, layout.tensor_index, strict=True)]
