"""An ordinary text-classification script: transformers' Trainer on CSV files. It knows nothing of rose_ds."""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class Data:
    model: str
    train_file: str
    validation_file: str


def main() -> None:
    data, args = HfArgumentParser((Data, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    raw = load_dataset("csv", data_files={"train": data.train_file, "validation": data.validation_file})
    tokenizer = AutoTokenizer.from_pretrained(data.model)
    rows = raw.map(lambda row: tokenizer(row["sentence"], truncation=True, max_length=48), batched=True)
    model = AutoModelForSequenceClassification.from_pretrained(data.model, num_labels=2)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        print("evaluated", metrics["eval_accuracy"], "log", trainer.state.log_history[0])


if __name__ == "__main__":
    main()
