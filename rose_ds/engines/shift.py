"""A shift of the input embeddings, for objectives that train on perturbed inputs."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rose_ds.errors import RefusedConfiguration
from rose_ds.objectives.base import Start

#: The hooks of each model: they are the model's, and it can be prepared more than once.
_HOOKS: WeakKeyDictionary[nn.Module, list[RemovableHandle]] = WeakKeyDictionary()


class EmbeddingShift:
    """Adds a shift to what the input embeddings return, inside whatever wraps the model: a forward hook.

    Not ``inputs_embeds``, which changes RoBERTa's positions under padding and a decoder's choice of the last token, and
    fails under FSDP2. The hook stays until the model is prepared again and does nothing between shifted passes.
    """

    def __init__(self, module: nn.Module) -> None:
        find = getattr(module, "get_input_embeddings", None)
        embeddings = find() if find is not None else None
        if not isinstance(embeddings, nn.Module):
            raise RefusedConfiguration(
                f"{type(module).__name__} has no get_input_embeddings(), so there is nothing to shift: objectives "
                "smart and freelb need a model whose get_input_embeddings() returns its embedding module"
            )
        self.padding_idx = getattr(embeddings, "padding_idx", None)
        self.shift: Tensor | Start | None = None
        self.calls, self.used = 0, False
        self._seed = 0
        self._attention: Tensor | None = None
        self._ids: Tensor | None = None
        _HOOKS[module] = [
            module.register_forward_pre_hook(self._look_at_inputs, with_kwargs=True),
            embeddings.register_forward_hook(self._add),
        ]

    @staticmethod
    def remove(module: nn.Module) -> None:
        """Take away what an earlier stepper of the same model left."""
        for handle in _HOOKS.pop(module, []):
            handle.remove()

    def set(self, shift: Tensor | Start | None) -> None:
        """For the next pass; a callable is called once the embeddings' shape is known."""
        self.shift, self.calls, self._attention = shift, 0, None
        if callable(shift):
            # drawn before the pass and from a generator of its own: the pass's random numbers stay the dropout's
            self._seed = int(torch.randint(2**62, ()))
        self.used = self.used or shift is not None

    def take(self) -> Tensor | None:
        """The shift that the pass used: a leaf. Nothing is shifted any more."""
        shift, self.shift = self.shift, None
        if shift is not None and self.calls != 1:
            raise RefusedConfiguration(
                f"forward() ran the input embeddings {self.calls} times, so it is not clear which tokens are to be "
                "shifted (an encoder and a decoder may share them): objectives smart and freelb need one run a pass"
            )
        assert shift is None or isinstance(shift, Tensor)
        return shift

    def _look_at_inputs(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids", args[0] if args else None)
        self._attention = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self._ids = ids if isinstance(ids, Tensor) and ids.dim() == 2 else None

    def _add(self, embeddings: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        self.calls += 1
        if self.used and torch._C._current_graph_task_id() != -1:
            raise RefusedConfiguration(
                "the input embeddings run again inside the backward pass (activation checkpointing includes them), "
                "without the shift they had: checkpoint the layers above them only"
            )
        if self.shift is None:
            return None
        if self._ids is not None and args and _is_turned(args[0], self._ids):
            raise RefusedConfiguration(
                "the model embeds its tokens as (length, batch) and not as (batch, length), as XLNet does: objectives "
                "smart and freelb would take a position of the whole batch for a text"
            )
        if callable(self.shift):
            real = self._attention.bool() if self._attention is not None else self._not_padding(args, out)
            generator = torch.Generator(out.device).manual_seed(self._seed)
            with torch.no_grad():
                self.shift = self.shift(real, tuple(out.shape), generator).float()
        if not self.shift.requires_grad:
            self.shift = self.shift.detach().requires_grad_()
        return out + self.shift.to(out.dtype)

    def _not_padding(self, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if args and self.padding_idx is not None and args[0].shape == out.shape[:-1]:
            return args[0] != self.padding_idx
        return torch.ones(out.shape[:-1], dtype=torch.bool, device=out.device)


def _is_turned(embedded: Tensor, ids: Tensor) -> bool:
    """Whether ids (batch, length) were turned before they were embedded."""
    if embedded.shape != ids.shape[::-1]:
        return False
    return ids.shape[0] != ids.shape[1] or bool(torch.equal(embedded, ids.T) and not torch.equal(embedded, ids))
