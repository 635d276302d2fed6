"""What an objective sees of a model: forward passes of one micro-batch, cut at their outputs.

A pass hands out fp32 leaves with the values of its outputs: the logits and, where it is asked for, the task loss. An
objective computes with these; its gradient with respect to a leaf is a cotangent, and the engine pulls (pass,
cotangents) pairs back through the model. So no engine ever sees a loss, and no objective a sharded model.

The task loss is an output of the pass, not a function of the cut logits: a loss that uses more than the logits (hidden
states, a regulariser inside the model) keeps its whole gradient.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from rose_ds.engines.rng import RngState, replay
from rose_ds.objectives.base import Start

if TYPE_CHECKING:
    from rose_ds.engines.batch import PassBatch

#: Logits of classes that are ruled out, -inf or near the type's lowest number, are at least of this size.
_MASKED = 1e9

Forward = Callable[[], Tensor]
Loss = Callable[[Tensor], Tensor]


class Sample(NamedTuple):
    """Some rows of a micro-batch, from which a fast first-order risk is found."""

    forward: Forward
    """Runs the model on these rows; returns their logits, (rows, ..., classes)."""
    rows: Tensor
    """Their positions in the micro-batch: shape (rows,), int64."""


@contextmanager
def still_statistics(module: nn.Module) -> Iterator[None]:
    """Normalise by the batch, as in training, without moving the running statistics that evaluation will use."""
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
    momenta = [layer.momentum for layer in layers]
    counts = [layer.num_batches_tracked for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
        layer.num_batches_tracked = None if layer.num_batches_tracked is None else layer.num_batches_tracked.clone()
    try:
        yield
    finally:
        for layer, momentum, count in zip(layers, momenta, counts, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, count


class Output(NamedTuple):
    """What a layer gave out, and what it was then."""

    tensor: Tensor
    version: int
    copy: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Output:
        """As it is now."""
        return cls(tensor, tensor._version, tensor.detach().clone())

    def was_overwritten(self) -> bool:
        """By something that autograd does not know of."""
        as_bytes = [z.detach().reshape(-1).view(torch.uint8) for z in (self.tensor, self.copy)]
        return self.tensor._version == self.version and not torch.equal(*as_bytes)


@contextmanager
def last_outputs(module: nn.Module, count: int = 4) -> Iterator[deque[Output]]:
    """The outputs of the last linear layers that run inside: logits are among them, before a loss has seen them."""
    outputs: deque[Output] = deque(maxlen=count)

    def keep(layer: nn.Module, args: object, out: object) -> None:
        if type(out) is Tensor:
            outputs.append(Output.of(out))

    handles = [m.register_forward_hook(keep) for m in module.modules() if isinstance(m, nn.Linear)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class ForwardPass:
    """One forward pass, which can be run again with the same random numbers where its graph is gone."""

    def __init__(
        self, batch: PassBatch, shift: Tensor | Start | None, like: ForwardPass | None, sampled: bool = False
    ) -> None:
        self.batch = batch
        self.sample = batch.sample if sampled else None
        """The rows it runs; None: all."""
        self._shift: Tensor | Start | None = shift
        self.leaves: list[Tensor] = []
        """fp32, with the outputs' values."""
        self.outputs: list[Tensor] | None = None
        """Attached: the logits and, once asked for, the loss. None once pulled back."""
        self._loss_rng: RngState | None = None
        """Before loss(logits) was called: it may draw random numbers too."""
        self._changed = False
        """The loss changed the logits in place, and the leaf with them."""
        if batch.shifter is not None:
            batch.shifter.set(shift)
        self.rng: RngState = RngState.now() if like is None else like.rng
        self._run(replayed=like is not None)
        assert self.outputs is not None
        self.leaves = [self.outputs[0].detach().float().requires_grad_()]

    @property
    def logits(self) -> Tensor:
        """fp32 leaf."""
        if self._changed:
            raise RuntimeError(
                "loss(logits) changed the logits in place, which are also compared with those of another pass: make "
                "new ones (logits / T, logits.masked_fill(...)) or clone them first"
            )
        return self.leaves[0]

    @property
    def shift(self) -> Tensor | None:
        """fp32 leaf; its ``grad`` is there after a backward."""
        return self._shift  # type: ignore[return-value]  # a tensor once the pass has run

    def ask_for_loss(self) -> Tensor:
        """The task loss of this pass: a leaf."""
        if len(self.leaves) == 1:
            assert self.outputs is not None
            self._add_loss()
            self.leaves.append(self.outputs[1].detach().float().requires_grad_())
        return self.leaves[1]

    def _add_loss(self) -> None:
        assert self.outputs is not None
        logits, engine = self.outputs[0], self.batch.engine
        version = logits._version
        # what is not fp32 has a leaf of its own; and a loss does in later steps what it did in the first
        watched = engine.loss_overwrites is None and logits.dtype == torch.float32
        before = Output.of(logits) if watched else None
        if self._loss_rng is None:
            self._loss_rng = RngState.now()
            value = self.batch.loss_of(logits)
        else:
            with replay(self._loss_rng):
                value = self.batch.loss_of(logits)
        if before is not None and logits._version == version:  # or it is seen, in each step anew
            engine.loss_overwrites = before.was_overwritten()
        self._changed |= logits._version != version or (engine.loss_overwrites or False)
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise TypeError("loss(logits) must return a scalar tensor: the micro-batch's mean loss")
        self.outputs.append(value)

    def _run(self, *, replayed: bool) -> None:
        engine = self.batch.engine
        with_graph = torch.is_grad_enabled() and not (engine.single_graph and engine.graph_of is not None)
        if engine.single_graph and with_graph:
            engine.graph_of = self
        with ExitStack() as around:
            around.enter_context(torch.set_grad_enabled(with_graph))
            if replayed:
                around.enter_context(replay(self.rng))
            if self.batch.moved_statistics or self.sample is not None:
                around.enter_context(still_statistics(engine.module))
            logits = (self.sample or self.batch).forward()
        self.batch.moved_statistics |= self.sample is None
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"forward() must return the logits tensor, got {type(logits).__name__}; for a Hugging Face model: "
                "lambda: model(**inputs).logits"
            )
        if self.batch.shifter is not None:
            self._shift = self.batch.shifter.take()
        self.outputs = [logits]
        self.rearm = engine.after_forward()

    def attached(self) -> list[Tensor]:
        """Outputs with a graph that can still be pulled back through; the pass runs again where there is none."""
        engine = self.batch.engine
        lost = engine.single_graph and engine.graph_of is not self
        if self.outputs is None or lost:
            self.outputs = None  # freed before the graph of the same pass is built anew
            shift = self._shift
            if self.batch.shifter is not None:
                self.batch.shifter.set(shift)
            self._run(replayed=True)
            self._check_same()
            if len(self.leaves) == 2:
                self._add_loss()
                self._check_same_loss()
        assert self.outputs is not None
        return self.outputs

    def _check_same(self) -> None:
        assert self.outputs is not None
        again, first = self.outputs[0].detach(), self.logits.detach()
        sizes = first.abs()
        masked = min(_MASKED, 0.5 * torch.finfo(again.dtype).max)
        sizes = sizes.masked_fill(~(sizes < masked), 0.0)  # nor is a class that is ruled out a measure of the others
        tolerance = max(1e-3, 8 * torch.finfo(again.dtype).eps) * max(1.0, float(sizes.max()))
        # NaN twice is the same pass: the step will be skipped, on all ranks
        if not torch.allclose(again.float(), first, rtol=0, atol=tolerance, equal_nan=True):
            raise RuntimeError(
                "a replayed forward pass gave other logits: forward() must depend only on the model, its inputs and "
                "torch's random numbers (no counters, numpy or python random numbers inside)"
            )

    def _check_same_loss(self) -> None:
        assert self.outputs is not None
        again, first = self.outputs[1].detach().float(), self.leaves[1].detach()
        tolerance = max(1e-2, 16 * torch.finfo(self.outputs[0].dtype).eps)  # of logits that may differ a little too
        if not torch.allclose(again, first, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise RuntimeError(
                f"loss(logits) gave {float(first):.6g} for a pass and {float(again):.6g} when that was replayed: it "
                "must depend only on the logits, its labels and torch's random numbers (no counters, numpy or python "
                "random numbers inside)"
            )


class Pull(NamedTuple):
    """A pass, and the gradient of something with respect to each of its leaves (None: does not depend on it)."""

    p: ForwardPass
    cotangents: tuple[Tensor | None, ...]

    def roots(self) -> tuple[list[Tensor], list[Tensor]]:
        """Attached outputs and their cotangents, in the outputs' types."""
        outputs = self.p.attached()
        pairs = [(out, c.to(out.dtype)) for out, c in zip(outputs, self.cotangents, strict=True) if c is not None]
        return [out for out, _ in pairs], [c for _, c in pairs]

    def value(self) -> Tensor:
        """A scalar with this gradient, for engines that differentiate scalars only."""
        outputs, cotangents = self.roots()
        products = [(out.float() * c.float()).sum() for out, c in zip(outputs, cotangents, strict=True)]
        return torch.stack(products).sum()
