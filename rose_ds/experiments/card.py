"""The model card beside a trained model: what it is, how it was made, how good it is."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rose_ds
from rose_ds.experiments.metrics import Metrics
from rose_ds.experiments.settings import RunSettings

CARD = "README.md"
_SETS = (
    ("clean dev set", "glue"),
    ("adversarial set", "advglue"),
    ("perturbed dev set (typos, homoglyphs, distractors)", "perturbed"),
)
_TRAINING: tuple[str, ...] = (
    "learning_rate",
    "per_device_train_batch_size",
    "weight_decay",
    "warmup_steps",
    "lr_scheduler_type",
)


def write_card(folder: Path, metrics: Metrics, labels: Sequence[str]) -> None:
    """Write CARD into a model's folder, with this process's command."""
    (folder / CARD).write_text(card(metrics, labels, sys.argv), encoding="utf-8")


def card(metrics: Metrics, labels: Sequence[str], command: Sequence[str]) -> str:
    """The card's text."""
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "base_model": metrics.model,
        "tags": ["rose_ds", "adversarial-robustness"],
    }
    if metrics.model == RunSettings.model or Path(metrics.model).exists():  # the hub knows its own models' names alone
        del front["base_model"]
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    shown = [(text, *(getattr(metrics, f"{key}_{s}") for s in ("accuracy", "ece"))) for text, key in _SETS]
    rows = "\n".join(f"| {text} | {_percent(a)} | {_percent(e)} |" for text, a, e in shown if a is not None)
    method = {"objective": metrics.config.get("objective"), "masks": metrics.config.get("rose") or None}
    training = {name: metrics.config[name] for name in _TRAINING if name in metrics.config}
    words = _shown(command[1:])
    if (metrics.world_size or 1) > 1:
        words = f"# on each of {metrics.world_size} ranks, by a launcher\n{words}"
    return f"""---
{head}
---

# {metrics.task}, {metrics.method}

{metrics.model} fine-tuned on {metrics.task} with the method {metrics.method} for {metrics.steps} steps, seed
{metrics.seed}, in {metrics.precision} on {metrics.engine} x{metrics.world_size}. Labels by id: {", ".join(labels)}.

| measured on | accuracy | calibration error |
| --- | --- | --- |
{rows}

```python
from transformers import pipeline
classify = pipeline("text-classification", model="this folder")
```

## How it was made

```bash
{words}
```

- method: {_settings(method)}
- training: {_settings(training)}
- rose_ds {rose_ds.__version__}, commit {metrics.commit or "unknown"}; {_settings(metrics.packages)}
- everything else: metrics.json; every answer on every set: predictions.jsonl
"""


def _shown(words: Sequence[str]) -> str:
    """The command line, without what a launcher adds for a rank and what nobody else may read."""
    kept: list[str] = []
    after = ""
    for word in words:
        name, equals, _ = word.partition("=")
        name = name.replace("-", "_")
        if "__local_rank" not in (name, after):
            secret = after.endswith("_token") or (name.endswith("_token") and equals)
            shown = word.partition("=")[0] + "=..." if name.endswith("_token") else "..."
            kept.append(shown if secret else word)
        after = name if name.startswith("__") and not equals else ""
    if kept[:1] != ["train"]:  # launch/train.py's has no command
        kept.insert(0, "train")
    return shlex.join(["rose-ds", *kept])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in values.items() if value is not None)
