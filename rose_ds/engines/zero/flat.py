"""Stages 1 and 2 alike: whole parameters on every rank, one flat fp32 partition of each group's masters and moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from rose_ds.core.layout import Block
from rose_ds.engines.zero.adapter import Adapter
from rose_ds.optimizer import RoseAdamW, Slice


class FlatAdapter(Adapter):
    """Base for DeepSpeed's optimizers that map parameters into flat partitions (``param._hp_mapping``)."""

    def __init__(self, ds: Any, rose_optimizer: RoseAdamW, flats: Sequence[Tensor]) -> None:
        super().__init__(ds, rose_optimizer)
        self.flats = flats
        self.after_load()

    def after_load(self) -> None:
        # DeepSpeed links the parameters to their state once, after the first group's first step, when the other groups
        # have no state yet: their checkpoint fragments would stay empty. A load makes new states.
        super().after_load()
        self.ds_optimizer._hp_optimizer_states_linked = False
        self.ds_optimizer._lazy_init_hp_params_optimizer_state()

    def _slice_of(self, name: str, tensor_index: int, param: nn.Parameter) -> Slice | None:
        mapping = getattr(param, "_hp_mapping", None)
        if mapping is None:  # nothing of it lies in this rank's partition
            return None
        address = mapping.hp_fragment_address
        block = Block.flat(param.numel(), mapping.lp_fragment_address.start, address.numel)
        return Slice(name, tensor_index, self.flats[mapping.param_group_index], address.start, address.numel, block)

    def full_parameter(self, param: nn.Parameter) -> Tensor:
        full = safe_get_full_fp32_param(param)
        return param.detach().float().clone() if full is None else full.detach()
