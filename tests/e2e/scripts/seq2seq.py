"""Somebody's script: a tiny T5, trained with transformers' Seq2SeqTrainer."""

import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

torch.manual_seed(0)
model = T5ForConditionalGeneration(
    T5Config(vocab_size=100, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0)
)
ids = torch.randint(5, 90, (16, 8))
trainer = Seq2SeqTrainer(
    model=model,
    args=Seq2SeqTrainingArguments(
        "out", max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2, report_to=[], use_cpu=True,
        save_strategy="no", logging_steps=1, disable_tqdm=True,
    ),
    train_dataset=[{"input_ids": row, "labels": torch.cat([row[:5], torch.tensor([-100] * 3)])} for row in ids],
)  # fmt: skip
trainer.train()
kept = [v for e in trainer.state.log_history for k, v in e.items() if k.startswith("rose/kept")]
print(f"trained with {type(trainer.optimizer.optimizer).__name__}, kept {kept}")
