"""Adapters under ZeRO: a checkpoint holds what trains, and a run goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from habits import count_steps
from spawn import run_ranks
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from rose_ds import RoseConfig
from rose_ds.training.trainer import RoseTrainer

STAGES = (2, 3)
STEPS = 4
BASE = BertConfig(
    vocab_size=5000,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=16,
)


def trained(folder: Path, stage: int, resume: Path | None = None) -> dict[str, torch.Tensor]:
    """The adapters' parameters, and the head's, after the run."""
    from peft import LoraConfig, get_peft_model

    args = TrainingArguments(
        str(folder),
        deepspeed={
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        },
        max_steps=STEPS,
        save_steps=STEPS // 2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"], lora_dropout=0.1)
    model = get_peft_model(BertForSequenceClassification(BASE), lora)
    torch.manual_seed(1)
    rows = [{"input_ids": torch.randint(0, BASE.vocab_size, (8,)), "labels": torch.tensor(i % 2)} for i in range(32)]
    made = RoseTrainer(model=model, args=args, train_dataset=rows, rose=RoseConfig(include=("lora_B",)))
    steps = count_steps(made)
    made.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert len(steps) == (STEPS if resume is None else STEPS // 2)
    return {name: p for name, p in made.stepper.gather_parameters().items() if "lora" in name or "classifier" in name}


def on_two_ranks(rank: int, world: int, folder: str) -> dict[int, tuple[Any, Any]]:
    return {
        stage: (
            trained(Path(folder) / f"straight-{stage}", stage),
            trained(Path(folder) / f"resumed-{stage}", stage, Path(folder) / f"straight-{stage}" / "checkpoint-2"),
        )
        for stage in STAGES
    }


@pytest.fixture(scope="module")
def runs(extensions: object, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[int, Any]]]:
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapters")
    return folder, run_ranks(on_two_ranks, 2, str(folder), process_group=False, timeout=400)


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_is_uninterrupted(stage: int, runs: Any) -> None:
    for rank in runs[1]:
        straight, resumed = rank[stage]
        assert straight and all(torch.equal(p, resumed[name]) for name, p in straight.items())


@pytest.mark.parametrize("stage", STAGES)
def test_the_base_is_in_no_checkpoint(stage: int, runs: Any) -> None:
    """Trainer looks whether the engine can leave frozen weights out."""
    sizes = [path.stat().st_size for path in (runs[0] / f"straight-{stage}").rglob("*") if path.is_file()]
    assert max(sizes) < 4 * BASE.vocab_size * BASE.hidden_size / 4  # of the embeddings alone
