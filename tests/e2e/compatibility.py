"""Which Trainer settings and other people's trainers ROSE works with: tried, one row each. Models: models.py.

    python tests/e2e/compatibility.py        # writes docs/compatibility.md

test_compatibility.py tries every row again and compares it with the page.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from habits import first_line, rows, train, trainer
from transformers import Trainer

from rose_ds import RefusedConfiguration, RoseConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
SCRIPTS = Path(__file__).parent / "scripts"


# --- Trainer's settings ---

SETTINGS: dict[str, dict[str, Any]] = {
    "(defaults)": {},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "gradient_checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "gradient_checkpointing, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
    "warmup_steps": {"warmup_steps": 2},
    "lr_scheduler_type=cosine": {"lr_scheduler_type": "cosine"},
    "weight_decay": {"weight_decay": 0.1},
    "adam_beta1, adam_beta2, adam_epsilon": {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6},
    "max_grad_norm=0": {"max_grad_norm": 0.0},
    "max_grad_norm": {"max_grad_norm": 0.05},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "dataloader_drop_last": {"dataloader_drop_last": True},
    "dataloader_num_workers": {"dataloader_num_workers": 1},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": "all"},
    "average_tokens_across_devices=False": {"average_tokens_across_devices": False},
    "torch_empty_cache_steps": {"torch_empty_cache_steps": 1},
    "data_seed": {"data_seed": 5},
    "num_train_epochs": {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 32},
    "save and keep the best": {
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
        "load_best_model_at_end": True,
    },
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "optim=adamw_torch_fused": {"optim": "adamw_torch_fused"},
    "optim=adafactor": {"optim": "adafactor"},
    "optim=sgd": {"optim": "sgd"},
    "enable_jit_checkpoint": {"enable_jit_checkpoint": True},
}


def try_setting(name: str) -> str:
    """Strategy none against transformers' own loop, number by number; then ROSE-Ensemble."""
    with tempfile.TemporaryDirectory() as folder:
        out, more = Path(folder), {"optim": "adamw_torch", **SETTINGS[name]}
        evaluated = {"eval_dataset": rows(16)} if "eval_strategy" in more else {}
        try:
            masked = train(trainer(out / "rose", more=more, rose=RoseConfig(), **evaluated))[0]
            kept = [entry["rose/kept_first"] for entry in masked]
            assert all(0.59 < k < 0.61 for k in kept), kept
            ours = trainer(out / "none", more=more, rose=RoseConfig(strategy="none"), **evaluated)
            theirs = trainer(out / "theirs", cls=Trainer, more=more, **evaluated)
            theirs.model_accepts_loss_kwargs = False  # BERT's loss is a mean, whatever its signature says
            ours, theirs = train(ours), train(theirs)
        except RefusedConfiguration as error:
            return f"refused: {first_line(error)}"
    for mine, other in zip(ours[0], theirs[0], strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert mine[key] == other[key], f"{name}: {key} {mine[key]} and {other[key]}"
    differ = [key for key, value in ours[1].items() if not torch.equal(value, theirs[1][key])]
    assert not differ, f"{name}: weights differ in {differ[:3]}"
    return "equal to Trainer, bit for bit, with strategy none; ROSE trains"


# --- other people's trainers, as unmodified scripts ---

TRAINERS: dict[str, tuple[str, str, str]] = {
    "transformers Seq2SeqTrainer": ("seq2seq.py", "ensemble", "transformers"),
    "TRL SFTTrainer, second": ("sft.py", "second", "trl"),
    "TRL SFTTrainer, first": ("sft.py", "first", "trl"),
    "sentence-transformers SentenceTransformerTrainer": ("sentence_pairs.py", "second", "sentence_transformers"),
    "SetFit Trainer": ("setfit_trainer.py", "second", "setfit"),
}


def try_trainer(name: str) -> str:
    script, strategy, _ = TRAINERS[name]
    command = [sys.executable, "-m", "rose_ds.run", "--rose", f"strategy={strategy}", str(SCRIPTS / script)]
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=240, env=environment, check=False
        )
    if done.returncode == 0:
        assert "trained with RoseAdamW, kept" in done.stdout, done.stdout[-2000:]
        return f"ROSE trains (strategy {strategy})"
    said = re.search(r"^rose_ds.run: error: (.*)$", done.stderr, re.MULTILINE)
    assert said, done.stderr[-3000:]
    return f"refused: {first_line(ValueError(said[1]))}"


# --- the page ---

ROWS: dict[str, Callable[[], str]] = {
    **{f"setting/{name}": (lambda name=name: try_setting(name)) for name in SETTINGS},  # type: ignore[misc]
    **{f"trainer/{name}": (lambda name=name: try_trainer(name)) for name in TRAINERS},  # type: ignore[misc]
}
_SECTIONS = {
    "setting": (
        "Settings of TrainingArguments",
        "With strategy none, losses, gradient norms and weights against transformers' own loop with AdamW; then "
        "ROSE-Ensemble. (transformers' loop is told that BERT's loss is a mean: it would not divide it otherwise.)",
    ),
    "trainer": ("Other people's trainers", "An unmodified script under `python -m rose_ds.run`."),
}


def line_of(row: str, outcome: str) -> str:
    return f"| {row.partition('/')[2]} | {outcome} |"


def page(outcomes: dict[str, str]) -> str:
    parts = [
        "# Which Trainer settings and libraries has ROSE been tried with?\n\nMade by "
        "`python tests/e2e/compatibility.py`; every row is a test (`tests/e2e/test_compatibility.py`), which tries it "
        "again and fails where this page says something else.\n\n[Which models](models.md)\n"
    ]
    for section, (title, text) in _SECTIONS.items():
        lines = [line_of(row, outcome) for row, outcome in outcomes.items() if row.startswith(f"{section}/")]
        parts.append("\n".join([f"## {title}\n\n{text}\n\n| | |\n| --- | --- |", *lines, ""]))
    return "\n".join(parts)


def main() -> None:
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    outcomes = {}
    for row, attempt in ROWS.items():
        outcomes[row] = attempt()
        print(line_of(row, outcomes[row]), file=sys.stderr, flush=True)
    PAGE.write_text(page(outcomes))


if __name__ == "__main__":
    main()
