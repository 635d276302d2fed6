"""FSDP1 (``FullyShardedDataParallel``): parameters are flattened, and each rank holds a piece of the flat one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard

from rose_ds.core.layout import Block
from rose_ds.engines.base import unwrapped_name
from rose_ds.engines.torch.sharded import Managed, ShardedEngine, refuse_fp16_reduction
from rose_ds.errors import RefusedConfiguration
from rose_ds.exchange import all_max


class Fsdp1Engine(ShardedEngine):
    """Any backward pass ends the graphs of all passes, which then run again.

    And there is but one graph at a time: FSDP1 hooks a flat parameter's gradient accumulator at the first forward pass
    (torch/distributed/fsdp/_runtime_utils.py, _register_post_backward_hook) and not again before a backward pass; in
    mixed precision a second forward pass makes another accumulator, whose gradient would never be reduced.
    """

    name = "fsdp1"
    retains_graphs = False
    single_graph = True

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        self.forget_graph()
        self._reshard()
        with super().micro_batch():
            yield
        # FSDP gives no gradient to a parameter of which nothing lies here. Without one it would have no state either,
        # and a rank without any state would not know how many steps were taken.
        for param in self._params:
            if param.grad is None and param.numel() == 0:
                param.grad = torch.zeros_like(param)

    def ranks(self) -> int:
        module: Any = self.module
        replicas = getattr(module, "_inter_node_pg", None)  # of hybrid sharding
        return int(module.process_group.size()) * (int(replicas.size()) if replicas else 1)

    def agree_on_steps(self) -> None:
        """FSDP's checkpoints give no state to a parameter of which nothing lies here (torch/distributed/fsdp/
        _optim_utils.py, _shard_orig_param_state), and a rank that holds no other would begin to count at 0."""
        if not self.optimizer.loaded:
            return
        self.optimizer.loaded = False
        most = all_max(self.optimizer.steps_taken())
        for param in (p for group in self.optimizer.param_groups for p in group["params"]):
            if param.numel() == 0 and most:
                self.optimizer.init_state(param)["step"] = torch.tensor(float(most))

    @contextmanager
    def probing(self) -> Iterator[None]:
        self.forget_graph()
        with self._added_to_earlier_grads():  # a backward pass that reaches no parameter drops the gradients that wait
            yield
        self.graph_of = None
        for part, handle in _parts(self.module):
            # a backward pass that reaches no parameter leaves FSDP's views registered in their place, where nothing is
            # sharded: it takes them to be gone (torch/distributed/fsdp/_runtime_utils.py, _catch_all_reshard)
            if handle._use_orig_params and not handle.uses_sharded_strategy:
                _reshard(part, handle, False)

    def stepped(self) -> None:
        self._reshard()

    def _reshard(self) -> None:
        """A forward pass that no backward pass followed leaves its copy of weights, which the step does not reach, to
        the next one."""
        for part, handle in _parts(self.module):
            used = hasattr(handle.flat_param, "_local_shard")  # before its first pass there is nothing to give back
            if handle.uses_sharded_strategy and used and not handle.needs_unshard():
                _reshard(part, handle, True)

    def forget_graph(self) -> None:
        super().forget_graph()  # nor does that of a step that failed half-way
        for _, handle in _parts(self.module):
            hook = handle.flat_param.__dict__.pop("_post_backward_hook_state", None)
            if hook is not None:
                hook[-1].remove()

    def settle(self) -> None:
        if not all(handle.uses_sharded_strategy for _, handle in _parts(self.module)):
            raise RefusedConfiguration(
                "FSDP1 that shards nothing (one rank, or NO_SHARD) is not known to run passes with averaged "
                "weights exactly: use DistributedDataParallel, fully_shard or more ranks, or Smart(proximal=0)"
            )
        self._reshard()

    def gather_parameters(self) -> dict[str, Tensor]:
        with FullyShardedDataParallel.summon_full_params(self.module, writeback=False):
            return {unwrapped_name(n): p.detach().float().clone() for n, p in self.module.named_parameters()}

    def _find_managed(self, module: nn.Module) -> list[Managed]:
        found: dict[tuple[nn.Module, str], tuple[Any, ...]] = {}
        for _, handle in _parts(module):
            if handle._offload_params:
                raise RefusedConfiguration(
                    "FSDP1's CPUOffload(offload_params=True) keeps one gradient buffer for both backward passes: use "
                    "fully_shard with CPUOffloadPolicy, or DeepSpeed with offload_optimizer"
                )
            refuse_fp16_reduction(handle._reduce_dtype)
            flat = handle.flat_param
            groups = (handle.process_group,) if handle.uses_sharded_strategy else ()
            for i, (name, owner, _) in enumerate(flat._param_infos):
                shard = flat._shard_param_infos[i]  # padding, between parameters and at the end, is in none
                param = flat if flat._params is None else flat._params[i]
                offset = shard.offset_in_shard if flat._params is None and shard.in_shard else 0
                whole = torch.empty(flat._shapes[i], dtype=param.dtype, device="meta")
                start, numel = (shard.intra_param_start_idx, shard.numel_in_shard) if shard.in_shard else (0, 0)
                block = Block.flat(whole.numel(), start, numel)
                found[owner, name] = (nn.Parameter(whole, param.requires_grad), param, offset, block, groups)
        names: dict[nn.Module, list[str]] = {}
        for owner, name in found:
            names.setdefault(owner, []).append(name)
        return [
            Managed(unwrapped_name(f"{prefix}.{name}" if prefix else name), *found[owner, name])
            for prefix, owner in module.named_modules()
            for name in names.get(owner, [])
        ]

    def _check_sync(self) -> None:
        if not all(part._sync_gradients for part in FullyShardedDataParallel.fsdp_modules(self.module)):
            raise RefusedConfiguration(
                "FSDP's no_sync() would mix the gradient kept apart into the one that trains: leave it out "
                '(accelerate: gradient_accumulation_kwargs={"sync_each_batch": True}; accumulation stays exact)'
            )


def _parts(module: nn.Module) -> Iterator[tuple[Any, Any]]:
    """What FSDP wraps and holds parameters, with the handle of its flat parameter."""
    for part in FullyShardedDataParallel.fsdp_modules(module):
        if part._handle is not None:
            yield part, part._handle
