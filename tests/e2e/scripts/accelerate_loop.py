"""A training loop with accelerate and ROSE: ``accelerate launch accelerate_loop.py MODEL TRAIN.csv STEPS``."""

import sys

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import rose_ds


def main(name: str, train_file: str, steps: int) -> None:
    set_seed(0)
    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = load_dataset("csv", data_files=train_file, split="train")
    rows = rows.map(lambda row: tokenizer(row["sentence"], truncation=True, max_length=48), batched=True)
    rows = rows.remove_columns("sentence").rename_column("label", "labels")
    loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2).train()
    optimizer = rose_ds.RoseAdamW(model.named_parameters(), lr=1e-4, strategy="ensemble")

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        stepper = rose_ds.prepare(model)
    else:
        stepper = rose_ds.prepare(model, optimizer, accumulation_steps=2, max_grad_norm=1.0)

    reports: list[rose_ds.StepReport] = []
    for batch in loader:
        labels = batch.pop("labels")
        stepper.backward(
            lambda batch=batch: model(**batch).logits, lambda logits, labels=labels: F.cross_entropy(logits, labels)
        )
        report = stepper.step()
        if report is not None:
            reports.append(report)
            accelerator.print(f"step {report.step} tau {report.tau_first} kept {report.kept_fraction:.4f}")
        if len(reports) == steps:
            break

    whole = stepper.gather_parameters()  # on every rank; save whole models with accelerator.save_model
    accelerator.print("engine", stepper.engine.name, "parameters", len(whole), torch.__version__)
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
