"""One micro-batch on one engine: what an objective is called with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rose_ds.engines.checkpointing import refuse_hidden_weights
from rose_ds.engines.dropout import drops_layers
from rose_ds.engines.passes import Forward, ForwardPass, Loss, Pull, Sample, still_statistics
from rose_ds.engines.shift import EmbeddingShift
from rose_ds.objectives.base import RowComparing, Start

if TYPE_CHECKING:
    from rose_ds.engines.average import WeightAverage
    from rose_ds.engines.base import Engine

#: Micro-batches in a row whose two passes may be equal before it means "no dropout": with one row and bf16 logits, one
#: in a thousand is equal by chance; with stochastic depth alone and very few rows more than half may be.
_EQUAL_BY_CHANCE, _IN_DEPTH = 8, 200


class PassBatch:
    """One micro-batch on one engine, as an objective sees it (``rose_ds.objectives.base.MicroBatch``)."""

    def __init__(
        self,
        engine: Engine,
        forward: Forward,
        loss: Loss,
        *,
        shifter: EmbeddingShift | None = None,
        average: WeightAverage | None = None,
        compare: RowComparing | None = None,
        ranks_risk: bool = False,
        ranks_task: bool = False,
        one_sided: bool = False,
        sample: Sample | None = None,
    ) -> None:
        self.engine, self.forward, self.loss_of = engine, forward, loss
        self.shifter, self.average = shifter, average
        self.compare = compare
        self.one_sided, self.sample = one_sided, sample
        self.wants_risk, self.ranks_task = ranks_risk, ranks_task
        self.divergence: Tensor | None = None
        """The last value whose gradient was to be ranked, detached."""
        self.disagreed: Tensor | None = None
        """Of the two passes that were compared: the fraction of rows with two answers."""
        self.moved_statistics = False
        """A pass has been run that counts in BatchNorm's running statistics: one of a micro-batch does."""
        self.trained = False
        """backward() was called for the last time."""

    def run(self, shift: Tensor | Start | None = None, like: Any = None) -> ForwardPass:
        if shift is not None and self.shifter is None:
            raise TypeError("an objective that shifts embeddings must say so: shifts = True")
        return ForwardPass(self, shift, like)

    def loss(self, p: ForwardPass) -> Tensor:
        return p.ask_for_loss()

    def probe(self, shift: Tensor | Start, value: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        scale = self.engine.loss_scale  # a gradient of fp16 activations underflows without it
        with self.engine.probing():
            p = self.run(shift)
            assert p.outputs is not None and p.shift is not None
            p.rearm()
            (gradient,) = torch.autograd.grad(value(p.outputs[0].float()) * scale, p.shift)
        return p.shift.detach(), gradient / scale

    def backward(self, value: Tensor, *passes: Any, more: bool = False) -> None:
        self.trained = not more
        self.engine.pull(self.pulls_of(value, passes), more=more)
        for p in passes:
            p.outputs = None

    def risk(self, value: Tensor, *passes: Any, share: float = 0.0) -> None:
        if self.compare is not None and len(passes) == 2:
            self.disagreed = self.compare.disagreement(*(p.logits for p in passes))
        if not self.wants_risk and not (share and self.ranks_task):
            return
        self._require_dropout(passes[0].logits, passes[1])
        self._rank(value, passes, share)

    def pull_apart(self, value: Tensor, passes: Sequence[ForwardPass]) -> None:
        """The gradient of ``value`` at the weights goes to where what is ranked is kept, and nowhere else."""
        if not self.engine.graphs_looked_at:
            refuse_hidden_weights(self.engine, [out for p in passes for out in p.outputs or ()])
            self.engine.graphs_looked_at = True
        with still_statistics(self.engine.module):  # what is checkpointed runs again in here
            self.engine.pull_apart(self.pulls_of(value, passes))

    def one_sided_risk(self, a: Any = None) -> None:
        assert self.compare is not None
        compare = self.compare
        if self.sample is not None:
            compare = compare.of_rows(self.sample.rows, None if a is None else len(a.logits))
        if a is None:
            with torch.no_grad():
                known = ForwardPass(self, None, None, sampled=True).logits.detach()
        else:
            known = a.logits.detach()
            known = known if self.sample is None else known[self.sample.rows.to(known.device)]
        self.engine.forget_graph()
        b = ForwardPass(self, None, None, sampled=True)
        if b.logits.shape != known.shape:
            raise ValueError(
                f"the sample's forward() returned logits of shape {tuple(b.logits.shape)}, and its rows of the "
                f"micro-batch have {tuple(known.shape)}: it must run the model on just these rows"
            )
        self.disagreed = compare.disagreement(known, b.logits)
        self._require_dropout(known, b)
        self._rank(compare.symmetric_kl(known, b.logits), [b], 0.0)

    def _rank(self, value: Tensor, passes: Sequence[ForwardPass], share: float) -> None:
        self.divergence = value.detach()
        self.engine.share = share
        self.pull_apart(value, passes)
        if not self.engine.retains_graphs:
            for p in passes:
                p.outputs = None

    def symmetric_kl(
        self, logits_a: Tensor, logits_b: Tensor, *, reduction: str = "mean", fixed_targets: bool = False
    ) -> Tensor:
        assert self.compare is not None, "of a pass that only finds gradients of the loss"
        return self.compare.symmetric_kl(logits_a, logits_b, reduction=reduction, fixed_targets=fixed_targets)

    def summed_kl(self, logits: Tensor, target: Tensor) -> Tensor:
        assert self.compare is not None
        return self.compare.summed_kl(logits, target)

    def agree(self, ok: bool) -> bool:
        return self.engine.agree(ok)

    def average_logits(self) -> Tensor:
        assert self.average is not None, "an objective that asks for it has an average_decay()"
        torch.clear_autocast_cache()  # of the weights that are about to change, and then of these
        with torch.no_grad(), self.average.shown(), still_statistics(self.engine.module):
            logits = self.forward().detach().float()
        torch.clear_autocast_cache()
        return logits

    def pulls_of(self, value: Tensor, passes: Sequence[ForwardPass]) -> list[Pull]:
        """The gradient of ``value``, a micro-batch's share of the step, at the passes' outputs."""
        leaves = [leaf for p in passes for leaf in p.leaves]
        value = value / self.engine.accumulation_steps
        found = iter(torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True))
        return [Pull(p, tuple(next(found) for _ in p.leaves)) for p in passes]

    def _require_dropout(self, logits: Tensor, b: ForwardPass) -> None:
        if not torch.equal(logits, b.logits):
            self.engine.equal_passes, self.engine.passes_differ = 0, True
            return
        self.engine.equal_passes += 1
        module, rounded = self.engine.module, b.outputs is None or _is_rounded(b.outputs[0])
        deep = self.engine.passes_differ or drops_layers(module)
        patience = _IN_DEPTH if deep else _EQUAL_BY_CHANCE if rounded else 1
        if not module.training or self.engine.equal_passes >= patience:
            way_out = 'choose strategy="second"' if self.wants_risk else "choose another objective"
            raise RuntimeError(
                "two forward passes gave identical logits, so there is no first-order risk: call model.train() and use "
                f"dropout > 0, or {way_out} (LoRA with no other dropout than its own starts so, as its second matrix "
                "is 0: mask_warmup_steps=1 masks from the second step on)"
            )


def _is_rounded(values: Tensor) -> bool:
    """Whether a pass in low precision may have made them; accelerate gives out fp32."""
    return any(torch.equal(values, values.to(low).to(values.dtype)) for low in (torch.bfloat16, torch.float16))
