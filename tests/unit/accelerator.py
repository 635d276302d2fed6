"""A pretended accelerator: tensors that lie on the CPU and say that they do not, and a count of what would wait.

Code that chooses by ``tensor.device`` takes the way that it takes on a GPU. What has the host wait for a CUDA device is
counted: numbers read, results whose shape depends on values, and copies in either direction (of pageable memory). As
there, tensors of two devices do not mix, and fresh memory holds anything.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

#: The only type of device that needs no driver and is not the CPU.
DEVICE = torch.device("meta")
_WAITING = {
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::nonzero_static",
    "aten::equal", "aten::masked_select", "aten::bincount", "aten::unique", "aten::_unique2",
    "aten::unique_consecutive", "aten::unique_dim", "aten::histc", "aten::repeat_interleave",
}  # fmt: skip
_COPIES = {"aten::_to_copy", "aten::copy_"}
_FRESH = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


class Pretended(torch.Tensor):
    """A tensor whose values are in ``inner``, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        made: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of Accelerator()")


def pretend(tensor: Tensor) -> Tensor:
    """The same values, on the accelerator; the memory is shared."""
    return Pretended(tensor)


def values_of(tensor: Tensor) -> Tensor:
    """What a test looks at; not counted."""
    return tensor.inner if isinstance(tensor, Pretended) else tensor


class Accelerator(TorchDispatchMode):
    """Entered, it lets this thread compute with ``pretend``-ed tensors; ``waits`` counts by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.calls = 0
        self._above = _Above(self.waits)

    def __enter__(self) -> Accelerator:
        self._above.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._above.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        leaves = tree_leaves((args, kwargs))
        mine = [leaf for leaf in leaves if isinstance(leaf, Pretended)]
        asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if not mine and asked != DEVICE:
            return func(*args, **kwargs)
        self.calls += 1
        foreign = [t for t in leaves if isinstance(t, Tensor) and not isinstance(t, Pretended) and t.dim() > 0]
        leaves_device = bool(mine) and asked is not None and asked != DEVICE
        if name in _WAITING or (name in _COPIES and (foreign or leaves_device)) or _indexes_by_mask(name, args):
            self.waits[name] += 1
        elif foreign and name != "aten::_fused_adamw_":
            raise RuntimeError(f"{name}: tensors on two devices")
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        holders = {id(t.inner): t for t in mine}
        found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if name == "aten::sqrt":  # correctly rounded, as accelerators' is: that of CPUs depends on the processor
            found = args[0].inner.double().sqrt().to(found.dtype)
        if name in _FRESH:
            found.fill_(77)
        if leaves_device:
            return found.clone() if name in _COPIES else found
        if name == "aten::_local_scalar_dense":
            return found
        return tree_map(lambda t: holders.get(id(t), Pretended(t)) if isinstance(t, Tensor) else t, found)


class _Above(TorchFunctionMode):
    """What no dispatch shows: ``torch.tensor(number, device=...)`` builds on the host and copies, ``tolist`` copies."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            self.waits["a tensor of numbers"] += 1
            return Pretended(func(*args, **{**kwargs, "device": "cpu"}))
        if func is torch.Tensor.tolist and isinstance(args[0], Pretended):
            args = (args[0].cpu(),)
        return func(*args, **kwargs)


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, Pretended) else leaf


def _indexes_by_mask(name: str, args: Any) -> bool:
    if name not in ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"):
        return False
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
