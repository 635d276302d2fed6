"""What a model's outputs predict: where the logits are, of which distribution, and which of them count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from rose_ds.errors import RefusedConfiguration
from rose_ds.objectives.divergence import Distribution

#: The label of a token that no loss looks at, throughout torch and transformers.
_UNLABELLED = -100
_FORMS = (
    "understood are: a mapping or an object with 'logits' (or 'start_logits' and 'end_logits'), one tensor of logits, "
    "and a tuple with one tensor (batch, ..., classes) that the labels fit"
)


def distribution_of(module: nn.Module) -> Distribution:
    """By config.problem_type, which Hugging Face's models set in their first forward pass at the latest.

    Raises:
        RefusedConfiguration: a regression, which predicts no distribution.
    """
    kind = getattr(getattr(module, "config", None), "problem_type", None)
    if kind == "regression":
        raise RefusedConfiguration(
            "the model is a regression (config.problem_type), and its outputs are no distribution that two passes "
            'could be compared by: use strategy="second" or "none" with objective "task" or "freelb"'
        )
    return "bernoulli" if kind == "multi_label_classification" else "categorical"


def labels_in(inputs: Mapping[str, Any], names: list[str]) -> Tensor | None:
    """The one tensor of labels, or of several the one of that name; without a last dimension of size 1 that class
    numbers do not need.
    """
    found = [inputs[name] for name in names if isinstance(inputs.get(name), Tensor)]
    if len(found) > 1 and isinstance(inputs.get("labels"), Tensor):
        found = [inputs["labels"]]  # and others of something else
    if len(found) != 1:
        return None
    labels = found[0]
    return labels.squeeze(-1) if labels.dim() > 1 and labels.shape[-1] == 1 and not _is_float(labels) else labels


def find_logits(outputs: Any, labels: Tensor | None, rows: int | None, classes: int | None) -> Tensor:
    """The logits among what a model, or an overridden ``compute_loss``, returned.

    Args:
        outputs: whatever it was.
        labels: the micro-batch's, where they are one tensor.
        rows: the micro-batch's number of rows, where it is known.
        classes: the model's number of classes, where it says so; decides between several tensors that would fit.

    Raises:
        RefusedConfiguration: there are none, or more than one tensor could be them.
    """
    if isinstance(outputs, Mapping):
        if isinstance(outputs.get("logits"), Tensor):
            return _checked(outputs["logits"], labels)
        if "start_logits" in outputs and "end_logits" in outputs:  # two distributions over a text's positions
            return torch.stack([outputs["start_logits"], outputs["end_logits"]], 1)
        raise RefusedConfiguration(
            f"the model's outputs ({', '.join(map(str, outputs))}) have no logits, which this strategy or objective "
            f"compares: {_FORMS}. Without any: strategy second, none or a control, with objective task or freelb"
        )
    if isinstance(getattr(outputs, "logits", None), Tensor):
        return _checked(outputs.logits, labels)
    candidates = (
        [outputs] if isinstance(outputs, Tensor) else list(outputs) if isinstance(outputs, (tuple, list)) else []
    )
    fitting = [z for z in candidates if isinstance(z, Tensor) and _could_be(z, labels, rows)]
    if len(fitting) > 1 and classes is not None:
        fitting = [z for z in fitting if z.shape[-1] == classes] or fitting
    if len(fitting) == 1:
        return _checked(fitting[0], labels)
    shapes = [tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__ for z in candidates]
    raise RefusedConfiguration(
        f"{'several' if fitting else 'none'} of the outputs {shapes or type(outputs).__name__} could be the logits of "
        f"labels {None if labels is None else tuple(labels.shape)}: {_FORMS}. Let compute_loss(return_outputs=True) "
        "return (loss, {'logits': logits})"
    )


def _could_be(z: Tensor, labels: Tensor | None, rows: int | None) -> bool:
    if not _is_float(z) or z.dim() < 2 or (rows is not None and z.shape[0] != rows):
        return False
    if labels is None:
        return True
    return z.shape == labels.shape if _is_float(labels) else z.shape[: labels.dim()] == labels.shape


def _checked(logits: Tensor, labels: Tensor | None) -> Tensor:
    if labels is not None and labels.dim() > 1 and not _is_float(labels) and logits.shape[:-1] != labels.shape:
        raise RefusedConfiguration(
            f"logits of shape {tuple(logits.shape)} do not end in the classes of labels of shape "
            f"{tuple(labels.shape)}, so the divergence between two passes would be of something else: let "
            "compute_loss(return_outputs=True) return (loss, {'logits': logits}) with logits of the labels' shape and "
            "the classes last"
        )
    return logits


def positions_of(labels: Tensor | None, module: nn.Module) -> Tensor | None:
    """Where a token is predicted that is labelled; None where a row has one prediction.

    A causal language model's logits at a token predict the next one's label.
    """
    if labels is None or labels.dim() < 2 or _is_float(labels):
        return None
    labelled = labels != _UNLABELLED
    if not _is_causal(module):
        return labelled
    nothing = torch.zeros_like(labelled[:, :1])
    return torch.cat([labelled[:, 1:], nothing], 1)


def _is_causal(module: nn.Module) -> bool:
    """Whether the loss is taken of the next token: as transformers tells, with the model under an adapter's."""
    base = getattr(module, "get_base_model", lambda: module)()
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return False  # whose decoder's inputs are shifted
    kind = getattr(base, "loss_type", None) or type(base).__name__
    if kind.endswith(("WithLMHeadModel", "XLNetLMHeadModel")):
        return False  # XLM's, Flaubert's and XLNet's label what stands there
    return LOSS_MAPPING.get(kind) is ForCausalLMLoss or "ForCausalLM" in kind or kind.endswith("LMHeadModel")


def refuse_unclear_labels(logits: Tensor, labels: Tensor | None, module: nn.Module) -> None:
    """Labels that are numbers for each class may be several truths, or one that is uncertain.

    Raises:
        RefusedConfiguration: config.problem_type does not say which.
    """
    kind = getattr(getattr(module, "config", None), "problem_type", None)
    if labels is not None and _is_float(labels) and labels.shape == logits.shape and kind is None:
        raise RefusedConfiguration(
            "the labels are numbers, one for each of the model's outputs: set config.problem_type to "
            '"multi_label_classification" (each label true or not), "single_label_classification" (probabilities that '
            'add up to 1) or "regression", so that two passes can be compared'
        )


def _is_float(z: Tensor) -> bool:
    return z.is_floating_point()
