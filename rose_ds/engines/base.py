"""What every engine answers: how passes are pulled back, and which slice of which parameter lies here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from rose_ds.core.layout import Layout
from rose_ds.core.threshold import Exchange
from rose_ds.eligible import eligible_names
from rose_ds.engines.passes import ForwardPass, Pull
from rose_ds.errors import RefusedConfiguration
from rose_ds.exchange import all_agree
from rose_ds.optimizer import RoseAdamW, Slice, local

#: Attributes under which wrappers keep the module they wrap: FSDP1, checkpoint_wrapper, torch.compile.
_WRAPPED_AS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


class Decision(Protocol):
    """Called once a step, when gradients are reduced and nothing is updated yet: sets the optimizer's plan."""

    def __call__(
        self, grads: Sequence[Tensor], grad_norm: float | None, scale: Tensor | float = 1.0, clip: float = 1.0
    ) -> None:
        """
        Args:
            grads: each eligible slice's gradient, 1-D.
            grad_norm: its global norm before clipping, None where it is not known.
            scale: what the step still multiplies ``grads`` with (unscaling and clipping).
            clip: the factor by which clipping shrinks the gradient, whether or not it has been applied.
        """


@dataclass(frozen=True)
class Outcome:
    """What an engine knows after an optimizer step."""

    grad_norm: float | None
    skipped: bool


class Engine(ABC):
    """Passes pulled back into gradients, and where the slices lie. Subclasses call ``_locate`` when they are set up."""

    name: str
    slices: list[Slice]
    layout: Layout

    gradients_may_be_dropped = False
    """Whether a loop can drop a step's gradients by itself (zero_grad)."""
    retains_graphs = True
    """Whether a pass can be pulled back twice; otherwise it is run again for the second time."""
    pulls_reentrant = False
    """Whether weights inside one of torch's reentrant checkpoints get their gradients in every pull of a pass."""
    single_graph = False
    """Whether there is one graph at a time: any backward pass ends it, and while it waits other passes run without."""
    recovers = False
    """Whether training can go on after a backward pass that failed, and with other trainable parameters."""
    replicated = False
    """Whether every rank holds every slice."""
    compiled = False
    """Whether some of the model is compiled, and its hooks with it."""
    tells_gradient_so_far = True
    """Whether ``keep_gradient_so_far`` can be called between two micro-batches of a step."""
    loss_scale = 1.0
    """What gradients are multiplied with until the step; 1 but for fp16."""

    def __init__(self, module: nn.Module, optimizer: RoseAdamW, accumulation_steps: int) -> None:
        self.module, self.optimizer, self.accumulation_steps = module, optimizer, accumulation_steps
        self.equal_passes, self.passes_differ = 0, False
        """Micro-batches in a row whose two dropout passes gave the same logits; and whether some ever gave others."""
        self.graphs_looked_at = False
        """For checkpoints under which ``pull_apart`` would miss weights."""
        self.loss_overwrites: bool | None = None
        """Whether loss(logits) changes fp32 logits unseen (kernels that write gradients over them); None: not known."""
        self.graph_of: ForwardPass | None = None
        """The pass whose graph waits, on an engine with a single one."""
        self.share = 0.0
        """How much of the gradient kept apart the objective also trains on."""
        self._risk_grads: list[Tensor] | None = None
        self.failure: str | None = None
        """What ended an earlier micro-batch half-way, where the library that runs the model cannot go on after it."""
        self._find_eligible()

    # --- passes ---

    def micro_batch(self) -> AbstractContextManager[object]:
        """Around all passes and pulls of one micro-batch."""
        return nullcontext()

    @abstractmethod
    def pull(self, pulls: Sequence[Pull], *, more: bool) -> None:
        """Add to the gradient that updates the weights; ``more``: the micro-batch has more of it to come."""

    @abstractmethod
    def pull_apart(self, pulls: Sequence[Pull]) -> None:
        """Add to fp32 sums over this rank's eligible slices (``take_risk_grads``), and nowhere else."""

    def probing(self) -> AbstractContextManager[object]:
        """Around a forward pass and ``autograd.grad`` with respect to a shift alone."""
        return nullcontext()

    def after_forward(self) -> Callable[[], None]:
        """Called after each forward pass; the result is called before that pass is pulled back."""
        return lambda: None

    def forget_graph(self) -> None:
        """On an engine with a single graph: none waits, and the next pass has it. The pass it was of runs again."""
        self.graph_of = None

    def agree(self, ok: bool) -> bool:
        """Whether every rank of the job says ``ok``. A collective."""
        return all_agree(ok)

    # --- the step ---

    def count(self, *, last: bool) -> None:
        """In place of ``step``: the loop has had a micro-batch, and steps by itself after a step's ``last``.

        Raises:
            RefusedConfiguration: the last one's gradients were not reduced.
        """
        raise NotImplementedError

    def first_passes_made(self) -> None:  # noqa: B027
        """A micro-batch went through: what looks at passes alone need look no more."""

    def agree_on_steps(self) -> None:  # noqa: B027
        """Before a micro-batch: ranks know how many steps were taken. A collective where a state was loaded."""

    @abstractmethod
    def step(self, decide: Decision) -> Outcome | None:
        """Count a micro-batch; at the accumulation boundary clip, call ``decide`` once, update, zero the gradients."""

    def stepped(self) -> None:  # noqa: B027
        """After an optimizer step, whoever made it: forward passes find the new weights."""

    def forget_micro_batches(self) -> None:  # noqa: B027
        """No step is going to be made of those since the last one: training is at its end."""

    # --- weights and slices ---

    @abstractmethod
    def find_slices(self, names: Sequence[str]) -> tuple[list[Slice], list[Exchange], list[Exchange]]:
        """This rank's slices of the named parameters, numbered by their position in ``names``, the exchange of each,
        and every exchange of the model."""

    @abstractmethod
    def gather_parameters(self) -> dict[str, Tensor]:
        """Full fp32 parameters by unwrapped name, on every rank. A collective."""

    def settle(self) -> None:  # noqa: B027  most engines have nothing to do
        """Before the slices' weights are read or written: forget copies that were gathered from them."""

    def publish(self) -> None:  # noqa: B027
        """After the slices' weights were written: bring them to where a forward pass finds them."""

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The model's parameters by their unwrapped names, in the model's order."""
        return [(unwrapped_name(name), param) for name, param in self.module.named_parameters()]

    def shape(self, param: nn.Parameter) -> torch.Size:
        """Shape of the whole parameter, sharded or not."""
        return param.shape

    def numel(self, param: nn.Parameter) -> int:
        """Number of elements of the whole parameter, sharded or not."""
        return self.shape(param).numel()

    def beta1_of(self) -> dict[Tensor, float]:
        """beta1 of each tensor in the optimizer, from its group."""
        return {p: group["betas"][0] for group in self.optimizer.param_groups for p in group["params"]}

    def trainable_slices(self) -> list[Slice]:
        """This rank's slices of every trainable parameter, eligible or not."""
        return self.find_slices([name for name, p in self.named_parameters() if p.requires_grad])[0]

    def trainable_count(self) -> int:
        """Elements of the trainable parameters, whole, eligible or not."""
        return sum(self.numel(param) for _, param in self.named_parameters() if param.requires_grad)

    def _find_eligible(self) -> None:
        shapes = {name: self.shape(param) for name, param in self.named_parameters() if param.requires_grad}
        config = self.optimizer.config
        self.eligible = eligible_names(config, shapes) if config.strategy != "none" else []
        self._trainable = self._what_is_trainable()

    def _what_is_trainable(self) -> tuple[list[tuple[int, bool]], list[int]]:
        flags = [(id(param), param.requires_grad) for _, param in self.named_parameters()]
        return flags, [len(group["params"]) for group in self.optimizer.param_groups]

    def check_sums(self) -> None:  # noqa: B027  most engines reduce both alike
        """Before a micro-batch whose reduced gradient is compared with one that is kept apart.

        Raises:
            RefusedConfiguration: the library would change the one and not the other.
        """

    def follow_trainable(self, *, movable: bool) -> None:
        """Before a micro-batch: where parameters, requires_grad or the optimizer's groups changed, so do the slices.

        Raises:
            RefusedConfiguration: on an engine whose library laid gradients and states out once and for all, and where
                something belongs to the slices of before (not ``movable``, or gradients of earlier micro-batches).
        """
        if self._what_is_trainable() == self._trainable:
            return
        if not self.recovers or not movable or self._risk_grads is not None:
            when = " in the middle of a step, or with this method" * self.recovers
            raise RefusedConfiguration(
                "parameters, requires_grad or the optimizer's groups changed after prepare() (gradual unfreezing?), "
                f"which the {self.name} engine cannot follow{when}: "
                "freeze and unfreeze before the model is wrapped and prepare() is called, and train each phase in a run"
            )
        known = {i for i, _ in self._trainable[0]} | {id(p) for g in self.optimizer.param_groups for p in g["params"]}
        new = [name for name, p in self.named_parameters() if p.requires_grad and id(p) not in known]
        if new:
            raise RefusedConfiguration(
                f"{new[0]!r} came after prepare() (replaced, or added?), and the optimizer does not hold it, so it "
                "would not train: make it before RoseAdamW, or give it to optimizer.add_param_group()"
            )
        self._find_eligible()
        self._locate()

    def abandon(self, error: BaseException) -> None:
        """After a micro-batch that failed half-way: nothing of the step under way stays."""
        self.forget_risk_grads()
        self.graph_of = None
        if not self.recovers:
            self.failure = f"{type(error).__name__}: {error}"

    def _locate(self) -> None:
        """Find the slices, check that the ranks hold every eligible element exactly once, tell the optimizer."""
        self.slices, exchange_of, exchanges = self.find_slices(self.eligible)
        names = set(self.eligible)
        expected = sum(self.numel(p) for name, p in self.named_parameters() if name in names)
        found = 0
        for exchange in exchanges:
            here = sum(s.numel for s, e in zip(self.slices, exchange_of, strict=True) if e is exchange)
            found += int(exchange(torch.tensor([here])).sum())
        if found != expected:
            raise RefusedConfiguration(
                f"the {self.name} engine's ranks hold {found} eligible elements but the model has {expected}: "
                "parameters are missing from the optimizer, or are sharded in a way rose_ds does not know"
            )
        for piece in self.slices:
            if piece.param.is_complex():
                raise RefusedConfiguration(
                    f"{piece.name!r} is complex, and a risk is the size of a real gradient: leave it out with "
                    "exclude=, or keep real and imaginary parts (torch.view_as_real)"
                )
            if not local(piece.param).is_contiguous():
                raise RefusedConfiguration(
                    f"{piece.name!r} lies in memory in another order than its shape's (channels_last, or a transposed "
                    "view): before the optimizer is made, call model.to(memory_format=torch.contiguous_format), or "
                    "contiguous() on its data"
                )
        devices = sorted({str(s.param.device) for s in self.slices})
        if len(devices) > 1:
            raise RefusedConfiguration(
                f"the eligible parameters lie on several devices of one process ({', '.join(devices)}; device_map?): "
                "put the model on one device, or shard it over processes with FSDP or DeepSpeed"
            )
        self.layout = Layout(
            [s.tensor_index for s in self.slices],
            exchange_of,
            exchanges,
            len(self.eligible),
            expected,
            self.eligible,
            [s.block for s in self.slices],
        )
        self.optimizer.attach(self.slices)

    def slice_grads(self) -> list[Tensor]:
        """Each slice's gradient as it lies in the optimizer, 1-D; zeros for a parameter without one."""
        return [piece.grad() for piece in self.slices]

    # --- the gradient kept apart ---

    def add_risk_grads(self, grads: Iterable[Tensor]) -> None:
        """Add one pull's gradient: 1-D tensors aligned with ``slices``; fp32 ones may be kept as they are."""
        if self._risk_grads is None:
            self._risk_grads = [g.detach().float() for g in grads]
        else:
            # not in place: autograd may hand out one tensor as the gradient of two parameters
            for i, grad in enumerate(grads):
                self._risk_grads[i] = self._risk_grads[i] + grad

    def forget_risk_grads(self) -> None:
        """Whatever was kept apart is of no use any more."""
        self._risk_grads, self.share = None, 0.0

    def begin_step(self) -> None:  # noqa: B027  most engines have nothing to do
        """No gradient waits, where the loop may have dropped one: what comes is a step's first micro-batch."""

    def has_gradients(self) -> bool:
        """Whether any wait for a step, in an engine whose gradients a loop may drop."""
        return any(p.grad is not None for group in self.optimizer.param_groups for p in group["params"])

    def keep_gradient_so_far(self) -> None:
        """Between two micro-batches: copy the gradient of those so far to where the one kept apart is."""
        self._risk_grads = None
        self.add_risk_grads(grad.to(torch.float32, copy=True) for grad in self.slice_grads())

    def take_risk_grads(self) -> list[Tensor] | None:
        """The gradient kept apart, summed over the micro-batches that were pulled apart, or up to where it was kept;
        forgets it.
        """
        grads, self._risk_grads = self._risk_grads, None
        return grads


def unwrapped_name(name: str) -> str:
    """A parameter's name in the model that was wrapped."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED_AS)
