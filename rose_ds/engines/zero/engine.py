"""A DeepSpeedEngine, behind the stepper."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.torch_autocast import autocast_if_enabled
from torch import Tensor, nn

from rose_ds.core.threshold import Exchange, local_only
from rose_ds.engines.base import Decision, Engine, Outcome
from rose_ds.engines.passes import Pull
from rose_ds.engines.zero.adapter import Adapter
from rose_ds.engines.zero.bf16 import Bf16Adapter
from rose_ds.engines.zero.checkpoint import Checkpoints
from rose_ds.engines.zero.partitioned import PartitionedAdapter
from rose_ds.engines.zero.refuse import check_engine, rose_optimizer_of
from rose_ds.engines.zero.replicated import Fp32Adapter, ReplicatedAdapter, UnfusedAdapter
from rose_ds.engines.zero.stage3 import Stage3Adapter
from rose_ds.errors import RefusedConfiguration
from rose_ds.exchange import group_exchange
from rose_ds.optimizer import RoseAdamW, Slice


class ZeroEngine(Engine):
    """ZeRO 0 to 3. Optimizer, accumulation and clipping are the DeepSpeed config's."""

    def __init__(self, ds: Any) -> None:
        optimizer = rose_optimizer_of(ds)
        check_engine(ds)
        self.ds = ds
        self.name = f"zero{int(ds.zero_optimization_stage())}"
        self._set_steps = int(ds.gradient_accumulation_steps())
        super().__init__(ds.module, optimizer, self._set_steps)
        self.adapter = _adapter_class(ds)(ds, optimizer)
        self._beta1_of = self.adapter.beta1_of()
        self.retains_graphs = self.adapter.shares_graph
        self.pulls_reentrant = self.name != "zero2"
        self.replicated = isinstance(self.adapter, ReplicatedAdapter)
        self.tells_gradient_so_far = self.adapter.reduces_each_micro_batch
        self._has_leaf_modules = any(hasattr(param, "ds_z3_leaf_module") for param in ds.module.parameters())
        self._locate()
        self.adapter.attach(self.adapter.find_slices(self.eligible))
        self.accumulating = False
        """Whether there are gradients of micro-batches that no optimizer step has used yet."""
        self.checkpoints = Checkpoints(ds, optimizer, lambda: self.accumulating, self.adapter.after_load)

    # --- passes ---

    def micro_batch(self) -> AbstractContextManager[object]:
        steps = int(self.ds.gradient_accumulation_steps())
        if steps != self._set_steps:  # by set_train_batch_size()
            self._set_steps = self.accumulation_steps = steps
        return self.adapter.micro_batch()

    def pull(self, pulls: Sequence[Pull], *, more: bool) -> None:
        self.accumulating = True
        parts = self._parts(pulls)
        for i, part in enumerate(parts):
            if hasattr(self.ds.optimizer, "clear_backward_seen_flag"):
                self.ds.optimizer.clear_backward_seen_flag()  # as a forward pass does: what comes adds to what is there
            # DeepSpeed reduces what its buffers hold at a boundary, which the micro-batch reaches with its last pull
            self._backward(part, boundary=False if more or i < len(parts) - 1 else None)

    def pull_apart(self, pulls: Sequence[Pull]) -> None:
        if self.ds.inside_no_sync_ctxt:
            raise RefusedConfiguration(
                "inside no_sync() ranks do not reduce the gradient that is ranked apart, and their masks would differ: "
                "leave it out; gradient_accumulation_steps in the DeepSpeed config reduces a step's task gradient once"
            )
        if self._risk_grads is None:
            self._risk_grads, self._risk_scale = self.adapter.risk_sums(), self.adapter.loss_scale
        for part in self._parts(pulls):
            # another pass may have to run again first: not while the task gradient is put aside
            for pull in part:
                pull.p.attached()
            # reduced at once, so that only this rank's slice of the sum is kept
            self.adapter.backward_apart(
                lambda part=part: self._backward(  # type: ignore[misc]
                    part, boundary=self.adapter.reduces_at_boundary, retain_graph=self.retains_graphs
                ),
                self._risk_grads,
            )

    def _parts(self, pulls: Sequence[Pull]) -> list[list[Pull]]:
        # Stage 3: through all passes at once, every parameter and every gradient would lie here whole.
        return [list(pulls)] if self.retains_graphs else [[pull] for pull in reversed(pulls)]

    def _backward(self, pulls: Sequence[Pull], *, boundary: bool | None, retain_graph: bool = False) -> None:
        ds = self.ds
        value = self.adapter.to_backward(torch.stack([pull.value() for pull in pulls]).sum())
        before = ds._is_gradient_accumulation_boundary
        # Also the optimizer's copy of it: the hook that sets that runs once a graph, and this may be the second time.
        ds.set_gradient_accumulation_boundary(ds.is_gradient_accumulation_boundary() if boundary is None else boundary)
        for pull in pulls:
            pull.p.rearm()
        try:
            with self._timed_as_one():
                ds.backward(value, retain_graph=retain_graph, scale_wrt_gas=False)
        finally:
            ds._is_gradient_accumulation_boundary = before
            if hasattr(ds.optimizer, "set_gradient_accumulation_boundary"):
                ds.optimizer.set_gradient_accumulation_boundary(ds.is_gradient_accumulation_boundary())

    @contextmanager
    def _timed_as_one(self) -> Iterator[None]:
        """wall_clock_breakdown and flops_profiler: DeepSpeed's hooks start a timer once a forward pass and stop it once
        a backward pass, of which there need not be as many.
        """
        ds, timers = self.ds, self.ds.engine_timers
        ds.engine_timers = type(timers)(enable_micro_timers=False, enable_global_timers=False)
        ds._start_timers(timers.backward_timers)
        try:
            yield
        finally:
            ds._stop_timers(timers.backward_timers)
            ds.engine_timers = timers

    @contextmanager
    def probing(self) -> Iterator[None]:
        if self._has_leaf_modules:
            raise RefusedConfiguration(
                "ZeRO-3's leaf modules (set_z3_leaf_modules, stage3_module_granularity_threshold) reduce in every "
                "backward pass, also where SMART looks for a gradient of the embeddings alone: leave them out, or "
                "choose another objective"
            )
        # DeepSpeed's hooks on the engine's outputs divide by the accumulation steps and reduce: run the module itself
        ds = self.ds
        before = vars(ds).get("forward")

        def forward(*inputs: Any, **kwargs: Any) -> Any:
            with autocast_if_enabled(ds):
                return ds.module(*inputs, **kwargs)

        vars(ds)["forward"] = forward
        try:
            yield
        finally:
            if before is None:
                del vars(ds)["forward"]
            else:
                vars(ds)["forward"] = before

    def after_forward(self) -> Callable[[], None]:
        return self.adapter.rearmed()

    @property
    def loss_scale(self) -> float:  # type: ignore[override]
        """DeepSpeed's, which changes from step to step."""
        return self.adapter.loss_scale

    def keep_gradient_so_far(self) -> None:
        self._risk_grads, self._risk_scale = None, self.adapter.loss_scale
        self._risk_grads = [
            self.adapter.so_far(i).to(piece.param.device, torch.float32, copy=True)
            for i, piece in enumerate(self.slices)
        ]

    def take_risk_grads(self) -> list[Tensor] | None:
        grads = super().take_risk_grads()
        if grads and self._risk_scale != 1.0:
            torch._foreach_mul_(grads, 1.0 / self._risk_scale)
        return grads

    # --- the step ---

    def step(self, decide: Decision) -> Outcome | None:
        boundary = self.ds.is_gradient_accumulation_boundary()
        norm: float | None = None
        decided = False

        def on_gradients(
            grads: Sequence[Tensor], grad_norm: float | None, scale: Tensor | float = 1.0, clip: float = 1.0
        ) -> None:
            nonlocal norm, decided
            norm, decided = grad_norm, True
            decide(grads, grad_norm, scale, clip)

        if boundary:
            self._beta1_of = self.adapter.beta1_of()
            self.adapter.on_gradients = on_gradients
            if isinstance(self.adapter, Fp32Adapter):
                self.adapter.measure_norm()
        try:
            self.ds.step()
        finally:
            self.adapter.on_gradients = None
        if not boundary:
            return None
        self.adapter.after_step()
        self.accumulating = False
        # DeepSpeed returns before the decision when the gradient is not finite
        return Outcome(norm, skipped=not decided or self.optimizer.skips)

    def forget_micro_batches(self) -> None:
        self.accumulating = False

    # --- weights and slices ---

    def find_slices(self, names: Sequence[str]) -> tuple[list[Slice], list[Exchange], list[Exchange]]:
        slices = [piece for piece, _ in self.adapter.find_slices(names)]
        exchange = local_only if self.replicated else group_exchange(self.ds.optimizer.dp_process_group)
        return slices, [exchange] * len(slices), [exchange]

    def shape(self, param: nn.Parameter) -> torch.Size:
        return torch.Size(getattr(param, "ds_shape", param.shape))

    def beta1_of(self) -> dict[Tensor, float]:
        # DeepSpeed takes the groups apart while it steps them: what they were before
        return self._beta1_of

    def publish(self) -> None:
        self.adapter.publish()

    def gather_parameters(self) -> dict[str, Tensor]:
        return {name: self.adapter.full_parameter(p) for name, p in self.named_parameters()}


def _adapter_class(ds: Any) -> type[Adapter]:
    stage = int(ds.zero_optimization_stage())
    if isinstance(ds.optimizer, BF16_Optimizer):
        return Bf16Adapter
    if isinstance(ds.optimizer, RoseAdamW):
        return Fp32Adapter
    return (UnfusedAdapter, PartitionedAdapter, PartitionedAdapter, Stage3Adapter)[stage]
