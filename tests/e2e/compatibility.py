"""Which models, Trainer settings and other people's trainers ROSE works with: tried, one row each.

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
from habits import bert, rows, train, trainer
from transformers import CONFIG_MAPPING, Trainer

from rose_ds import RefusedConfiguration, RoseAdamW, RoseConfig, prepare
from rose_ds.training.describe import find_dropout

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
SCRIPTS = Path(__file__).parent / "scripts"

# --- architectures: tiny, with random weights ---

#: Whatever of this a configuration has is set: names differ from model to model.
_SMALL: dict[str, Any] = {
    "vocab_size": 100,
    **dict.fromkeys(("hidden_size", "d_model", "dim", "emb_dim", "n_embd", "embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "input_embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "hidden_dim", "ffn_dim", "dff", "n_inner", "d_inner"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "n_positions", "max_position_embeddings"), 64),
    **dict.fromkeys(("max_seq_len", "max_2d_position_embeddings"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "n_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("d_kv", "d_head", "head_dim"), 16),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.1),
    **{"rotary_dim": 8, "decoder_start_token_id": 2, "num_labels": 2},
    **{"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "cls_token_id": 2},
}
# fmt: off
TEXT = (
    "albert", "bart", "bert", "big_bird", "bloom", "camembert", "convbert", "ctrl", "data2vec-text", "deberta",
    "deberta-v2", "distilbert", "electra", "ernie", "esm", "flaubert", "fnet", "gemma", "gpt2", "gpt_neox", "gptj",
    "ibert", "layoutlm", "llama", "longformer", "mbart", "megatron-bert", "mistral", "mobilebert", "modernbert",
    "mpnet", "mpt", "mra", "mvp", "nystromformer", "openai-gpt", "opt", "phi", "plbart", "qwen2", "qwen3", "rembert",
    "roberta", "roberta-prelayernorm", "roformer", "squeezebert", "starcoder2", "umt5", "xlm", "xlm-roberta",
    "xlm-roberta-xl", "yoso",
)
# fmt: on


def text_classifier(kind: str) -> tuple[Any, dict[str, Any]]:
    config = CONFIG_MAPPING[kind]
    known = config()
    always = ("num_labels", "pad_token_id", "decoder_start_token_id")
    torch.manual_seed(0)
    settings = {k: v for k, v in _SMALL.items() if hasattr(known, k) or k in always}
    model = transformers.AutoModelForSequenceClassification.from_config(config(**settings))
    return model, {**_text(), "labels": torch.tensor([0, 1, 0, 1])}


def _text() -> dict[str, Any]:
    ids = torch.randint(5, 90, (4, 16), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _tokens(model: Any) -> tuple[Any, dict[str, Any]]:
    text = _text()
    return model, {**text, "labels": torch.where(text["input_ids"] > 60, -100, text["input_ids"] % 2)}


def _next_tokens(model: Any) -> tuple[Any, dict[str, Any]]:
    text = _text()
    return model, {**text, "labels": text["input_ids"]}


def _images(config: Any) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = transformers.AutoModelForImageClassification.from_config(config)
    return model, {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.tensor([0, 1, 0, 1])}


def _lora(model: Any, targets: list[str]) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=targets))


def _llama(**more: Any) -> Any:
    torch.manual_seed(0)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    settings = {name: _SMALL[name] for name in (*names, "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, attention_dropout=0.1, **more))


def _t5() -> Any:
    torch.manual_seed(0)
    settings = {name: _SMALL[name] for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**settings, decoder_start_token_id=2))


_IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_labels": 2, "hidden_dropout_prob": 0.1}
_WIDTHS: dict[str, Any] = {name: _SMALL[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
HEADS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "BertForTokenClassification": lambda: _tokens(bert(transformers.BertForTokenClassification)),
    "BertForMaskedLM": lambda: _next_tokens(bert(transformers.BertForMaskedLM)),
    "LlamaForCausalLM": lambda: _next_tokens(_llama()),
    "T5ForConditionalGeneration": lambda: _next_tokens(_t5()),
    "BERT with LoRA": lambda: (_lora(bert(), ["query"]), {**_text(), "labels": torch.tensor([0, 1, 0, 1])}),
    "GPT-2 with LoRA": lambda: (_lora(text_classifier("gpt2")[0], ["c_attn"]), text_classifier("gpt2")[1]),
    "ViT": lambda: _images(transformers.ViTConfig(**_IMAGE, **_WIDTHS, num_attention_heads=2)),
    "BEiT": lambda: _images(transformers.BeitConfig(**_IMAGE, **_WIDTHS, num_attention_heads=2)),
    "Swin": lambda: _images(
        transformers.SwinConfig(
            image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4, num_labels=2
        )
    ),
    "ConvNeXt": lambda: _images(
        transformers.ConvNextConfig(
            hidden_sizes=[8, 16],
            depths=[2, 2],
            num_stages=2,
            num_labels=2,
            drop_path_rate=0.2,
            layer_scale_init_value=1.0,
        )  # fmt: skip
    ),
    "ResNet": lambda: _images(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=2)
    ),
}


def try_model(make: Callable[[], tuple[Any, dict[str, Any]]]) -> str:
    """A step of ROSE-Ensemble: the pattern it takes, the share of the model that is masked, where the noise is from."""
    for include in (None, "@blocks"):
        model, batch = make()
        model.train()
        given = {} if include is None else {"include": include}
        optimizer = RoseAdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], **given)
        try:
            stepper = prepare(model, optimizer)
            outputs: list[Any] = []

            def forward(model: Any = model, batch: Any = batch, outputs: Any = outputs) -> Any:
                outputs[:] = [model(**batch)]
                return outputs[0].logits

            stepper.backward(forward, lambda logits, outputs=outputs: outputs[0].loss)  # type: ignore[misc]
            report = stepper.step()
        except RefusedConfiguration as error:
            if include is None and "@blocks" in str(error):
                continue
            return f"refused: {_short(error)}"
        except RuntimeError as error:
            return f"refused: {_short(error)}"
        assert report is not None and report.kept_first is not None
        kept = report.kept_first / report.eligible
        assert 0.59 < kept < 0.7, f"kept {kept}"
        share = report.eligible / sum(p.numel() for p in model.parameters() if p.requires_grad)
        pattern = "the default" if include is None else f'`include="{include}"`'
        return f"{pattern} masks {share:.0%}; {', '.join(sorted(find_dropout(model)))}"
    raise AssertionError


def _short(error: BaseException) -> str:
    """A message up to its first way out, on one line."""
    return re.split(r"(?<=[a-z0-9)]): |; ", " ".join(str(error).split()))[0].replace("|", "\\|")


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
            return f"refused: {_short(error)}"
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
    return f"refused: {_short(ValueError(said[1]))}"


# --- the page ---

ROWS: dict[str, Callable[[], str]] = {
    **{f"model/{kind}": (lambda kind=kind: try_model(lambda: text_classifier(kind))) for kind in TEXT},  # type: ignore[misc]
    **{f"head/{name}": (lambda make=make: try_model(make)) for name, make in HEADS.items()},  # type: ignore[misc]
    **{f"setting/{name}": (lambda name=name: try_setting(name)) for name in SETTINGS},  # type: ignore[misc]
    **{f"trainer/{name}": (lambda name=name: try_trainer(name)) for name in TRAINERS},  # type: ignore[misc]
}
_SECTIONS = {
    "model": (
        "Text classifiers",
        "`AutoModelForSequenceClassification` of each kind, tiny and with random weights: one step of ROSE-Ensemble. "
        "The share is of the trainable parameters; after it, the layers whose dropout makes two passes differ.",
    ),
    "head": ("Other heads, adapters and images", "The same step."),
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
        "# What ROSE has been tried with\n\nMade by `python tests/e2e/compatibility.py`; every row is a test "
        "(`tests/e2e/test_compatibility.py`), which tries it again and fails where this page says something else.\n"
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
