"""RoseTrainer on MiniLM with dropout that does not depend on the number of ranks: prints its losses and thresholds.
A step is two micro-batches, or the one that is left at an epoch's end.

usage: same_losses.py MODEL TRAIN.csv STEPS GLOBAL_BATCH OUTPUT_DIR [DEEPSPEED.json]
"""

from __future__ import annotations

import json
import os
import sys

import torch
from datasets import load_dataset
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments, set_seed

from rose_ds import RoseConfig
from rose_ds.cli.ending import ending_process_group
from rose_ds.training.trainer import RoseTrainer

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class GlobalDropout(nn.Dropout):
    """Draws the mask of the whole batch on every rank and uses this rank's rows: one process sees the same numbers."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        rows = x.shape[0]
        mask = (torch.rand(rows * WORLD, *x.shape[1:]) >= self.p).to(x.dtype) / (1 - self.p)
        return x * mask[RANK * rows : (RANK + 1) * rows]


def main(name: str, train_file: str, steps: str, batch: str, out: str, deepspeed: str | None = None) -> None:
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    args = TrainingArguments(
        output_dir=out,
        max_steps=int(steps),
        per_device_train_batch_size=int(batch) // WORLD // 2,
        gradient_accumulation_steps=2,
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": fsdp}},
        learning_rate=1e-4,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        deepspeed=deepspeed,
    )
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = load_dataset("csv", data_files=train_file, split="train")
    rows = rows.map(lambda r: tokenizer(r["sentence"], truncation=True, max_length=32, padding="max_length"))
    # attention's own dropout is drawn inside a fused kernel, for this rank's rows alone
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2, attention_probs_dropout_prob=0.0)
    for part in list(model.modules()):
        for child, dropout in part.named_children():
            if isinstance(dropout, nn.Dropout):
                setattr(part, child, GlobalDropout(dropout.p))
    trainer = RoseTrainer(model=model, args=args, train_dataset=rows, rose=RoseConfig(strategy="ensemble"))
    trainer.train()
    if trainer.is_world_process_zero():
        log = [entry for entry in trainer.state.log_history if "rose/tau_first" in entry]
        assert trainer.stepper is not None
        result = {
            "engine": trainer.stepper.engine.name,
            "wrapper": type(trainer.model_wrapped).__name__,
            "losses": [entry["loss"] for entry in log],
            "taus": [entry["rose/tau_first"] for entry in log],
        }
        print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    with ending_process_group():
        main(*sys.argv[1:])
