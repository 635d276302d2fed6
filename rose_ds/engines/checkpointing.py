"""What others put into a model that would spoil a step's gradients: checkpointing, kernels that overwrite."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from rose_ds.engines.base import unwrapped_name
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
