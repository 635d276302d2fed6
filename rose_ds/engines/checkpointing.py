"""What others put into a model that would spoil a step's gradients: checkpointing, kernels that overwrite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from rose_ds.engines.base import Engine, unwrapped_name
from rose_ds.engines.dropout import find_dropout
from rose_ds.errors import RefusedConfiguration

#: Modules of gated layers that do: Liger's, and Unsloth's of every kind.
_OVERWRITING = ("liger_kernel.transformers.swiglu", "liger_kernel.transformers.geglu", "unsloth")


def refuse_checkpointing(module: nn.Module, *, twice: bool) -> None:
    """Activation checkpointing under which gradients are wrong.

    Args:
        twice: a micro-batch has several passes and gradients.

    Raises:
        RefusedConfiguration: a part that draws dropout masks draws others when it is recomputed; or, of several
            gradients, weights are hidden from one (reentrant).
    """
    for name, part in module.named_modules():
        for attribute in ("checkpoint_fn", "_gradient_checkpointing_func"):  # torch's wrapper, Hugging Face's layers
            function = getattr(part, attribute, None)
            if not isinstance(function, partial):
                continue
            if function.keywords.get("preserve_rng_state") is False and (twice or find_dropout(part)):
                raise RefusedConfiguration(
                    f"{unwrapped_name(name)!r} is checkpointed with preserve_rng_state=False: its dropout masks in the "
                    "backward pass are not those of the forward pass, so the gradients are wrong. Checkpoint with "
                    "preserve_rng_state=True; under accelerate's FSDP2 turn fsdp_activation_checkpointing off and use "
                    "gradient_checkpointing=True"
                )
            # torch's own, and transformers' round it, are reentrant unless they are told not to be
            unset = function.func is checkpoint or function.func.__module__.startswith("transformers.")
            if twice and function.keywords.get("use_reentrant", unset) in (True, None):
                raise RefusedConfiguration(
                    f"{unwrapped_name(name)!r} is checkpointed with use_reentrant=True, which hides its weights from a "
                    "second gradient of the same micro-batch: set use_reentrant=False (TrainingArguments: "
                    'activation_checkpointing_kwargs={"use_reentrant": False}, gradient_checkpointing_kwargs before '
                    "transformers 5.22)"
                )


def refuse_hidden_weights(engine: Engine, outputs: Sequence[Tensor]) -> None:
    """Checkpoints that a model makes inside its forward pass, and which show in the graphs of its outputs alone.

    Raises:
        RefusedConfiguration: weights inside one would miss a gradient that is found apart from the task's, or the graph
            can be pulled back once only.
    """
    if not engine.retains_graphs:  # each pull has a graph of its own, and reaches what the task's gradient does
        return
    for node in _graph(outputs):
        if type(node).__name__ != "CheckpointFunctionBackward":
            continue
        function = type(node)._forward_cls  # type: ignore[attr-defined]
        if function is CheckpointFunction and engine.pulls_reentrant:
            continue
        raise RefusedConfiguration(
            f"the model's forward pass checkpoints activations by {function.__module__}, reentrant, which hides "
            f"weights from a second gradient of the same micro-batch on the {engine.name} engine: call "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False) there, or train with ZeRO-3"
        )


def _graph(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """The nodes of the outputs' graphs."""
    waiting = [out.grad_fn for out in outputs if out.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


@contextmanager
def explaining_selective_checkpoints() -> Iterator[None]:
    """torch's do not say who asked for a second gradient, and what to do."""
    try:
        yield
    except RuntimeError as error:
        if "Trying to backward an extra time" not in str(error):
            raise
        raise RefusedConfiguration(
            "the model checkpoints selectively (context_fn=create_selective_checkpoint_contexts(...)), and what such a "
            "checkpoint keeps can be looked at once: a micro-batch of this method finds several gradients of a pass. "
            "Checkpoint with use_reentrant=False and without context_fn; or train with objective task and "
            'strategy="second"'
        ) from error


def refuse_overwriting(module: nn.Module) -> None:
    """Layers whose backward pass writes gradients over what the forward pass kept, with several gradients to a pass.

    Known by where their forward() comes from: kernels count no version up, so that autograd does not notice.

    Raises:
        RefusedConfiguration: there is one.
    """
    for name, part in module.named_modules():
        for source in (type(part).__module__, getattr(part.forward, "__module__", None) or ""):
            if source.startswith(_OVERWRITING):
                raise RefusedConfiguration(
                    f"{unwrapped_name(name)!r} runs {source}, whose backward pass writes gradients over what the "
                    "forward pass kept, and a micro-batch of several passes looks at it twice: apply these kernels "
                    "without swiglu and geglu (apply_liger_kernel_to_...(swiglu=False, geglu=False)), or train with "
                    'objective task and strategy="second"'
                )
