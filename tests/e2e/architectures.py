"""Tiny models of many architectures with random weights, and four rows for each: what models.py tries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from habits import bert
from transformers import CONFIG_MAPPING

#: A model, and its inputs: tensors of four rows, labels among them. The first two rows have as many labelled tokens as
#: the last two, so that a mean over all tokens is the mean of the two halves' means.
Made = tuple[Any, dict[str, Any]]

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
_ENCODERS = (
    "albert", "bert", "big_bird", "camembert", "convbert", "data2vec-text", "deberta", "deberta-v2", "distilbert",
    "electra", "ernie", "esm", "flaubert", "fnet", "ibert", "layoutlm", "longformer", "megatron-bert", "mobilebert",
    "modernbert", "mpnet", "mra", "nystromformer", "rembert", "roberta", "roberta-prelayernorm", "roformer",
    "squeezebert", "xlm", "xlm-roberta", "xlm-roberta-xl", "yoso",
)
_DECODERS = (
    "bloom", "ctrl", "gemma", "gpt2", "gpt_neox", "gptj", "llama", "mistral", "mpt", "openai-gpt", "opt", "phi",
    "qwen2", "qwen3", "starcoder2",
)
_ENCODER_DECODERS = ("bart", "mbart", "mvp", "plbart", "umt5")
_CAUSAL = ("bloom", "gemma", "gpt2", "gpt_neox", "llama", "mistral", "opt", "phi", "qwen2", "qwen3")
_SEQ2SEQ = ("bart", "mbart", "pegasus", "t5", "umt5")
# fmt: on


def _config(kind: str) -> Any:
    config = CONFIG_MAPPING[kind]
    known = config()
    always = ("num_labels", "pad_token_id", "decoder_start_token_id")
    torch.manual_seed(0)
    # Big Bird's sparse attention draws its blocks with numpy's random numbers, anew in each pass
    special = {"big_bird": {"attention_type": "original_full"}}.get(kind, {})
    return config(**{k: v for k, v in _SMALL.items() if hasattr(known, k) or k in always}, **special)


def text() -> dict[str, Any]:
    ids = torch.randint(5, 90, (4, 16), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def classes() -> dict[str, Any]:
    return {"labels": torch.tensor([0, 1, 0, 1])}


def classifier(kind: str) -> Made:
    return transformers.AutoModelForSequenceClassification.from_config(_config(kind)), {**text(), **classes()}


def tokens(made: Any) -> Made:
    """Every third token has a class."""
    inputs = text()
    labels = (inputs["input_ids"] % 2).masked_fill(torch.arange(16) % 3 > 0, -100)
    return made, {**inputs, "labels": labels}


def words(made: Any, labelled: slice) -> Made:
    """The tokens themselves are the labels, those of a span; the others are -100."""
    inputs = text()
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, labelled] = inputs["input_ids"][:, labelled]
    return made, {**inputs, "labels": labels}


def causal(kind: str) -> Made:
    """A prompt of seven tokens that no loss looks at, and an answer."""
    return words(transformers.AutoModelForCausalLM.from_config(_config(kind)), slice(7, 16))


def seq2seq(kind: str) -> Made:
    """Answers of twelve tokens, then padding that no loss looks at."""
    return words(transformers.AutoModelForSeq2SeqLM.from_config(_config(kind)), slice(0, 12))


def images(config: Any) -> Made:
    torch.manual_seed(0)
    made = transformers.AutoModelForImageClassification.from_config(config)
    return made, {"pixel_values": torch.randn(4, 3, 32, 32), **classes()}


def lora(made: Any, targets: list[str], task: str = "SEQ_CLS") -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(made, LoraConfig(task_type=task, r=4, target_modules=targets))


def eight_bit(kind: str) -> Any:
    """A classifier whose blocks' matrices are bitsandbytes' 8-bit ones; they cannot train."""
    import bitsandbytes

    made, _ = classifier(kind)
    for name, part in list(made.named_modules()):
        if isinstance(part, torch.nn.Linear) and ".layer" in name:
            small = bitsandbytes.nn.Linear8bitLt(part.in_features, part.out_features, has_fp16_weights=False)
            small.load_state_dict(part.state_dict())
            made.set_submodule(name, small.to("cpu"))
    return made


_IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_labels": 2, "hidden_dropout_prob": 0.1}
_WIDTHS: dict[str, Any] = {name: _SMALL[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
_IMAGES: dict[str, Callable[[], Any]] = {
    "ViT": lambda: transformers.ViTConfig(**_IMAGE, **_WIDTHS, num_attention_heads=2),
    "BEiT": lambda: transformers.BeitConfig(**_IMAGE, **_WIDTHS, num_attention_heads=2),
    "Swin": lambda: transformers.SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
        num_labels=2,
        drop_path_rate=0.5,
    ),
    "ConvNeXt": lambda: transformers.ConvNextConfig(
        hidden_sizes=[8, 16], depths=[2, 2], num_stages=2, num_labels=2, drop_path_rate=0.5, layer_scale_init_value=1.0
    ),
    "ResNet": lambda: transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=2),
}
_OTHERS: dict[str, Callable[[], Made]] = {
    "BertForTokenClassification": lambda: tokens(bert(transformers.BertForTokenClassification)),
    "BertForMaskedLM": lambda: words(bert(transformers.BertForMaskedLM), slice(3, 9)),
}
_ADAPTERS: dict[str, Callable[[], Made]] = {
    "BERT classifier, LoRA": lambda: (lora(bert(), ["query"]), {**text(), **classes()}),
    "GPT-2 classifier, LoRA": lambda: (lora(classifier("gpt2")[0], ["c_attn"]), {**text(), **classes()}),
    "Llama causal LM, LoRA": lambda: (
        lora(causal("llama")[0], ["q_proj", "v_proj"], "CAUSAL_LM"),
        causal("llama")[1],
    ),
    "BERT classifier in 8 bits, LoRA": lambda: (
        lora(eight_bit("bert"), ["query", "value"]),
        {**text(), **classes()},
    ),
}


def _each(make: Callable[[str], Made], kinds: tuple[str, ...]) -> dict[str, Callable[[], Made]]:
    return {kind: lambda kind=kind: make(kind) for kind in kinds}  # type: ignore[misc]


#: By section of the page, then by name.
MODELS: dict[str, dict[str, Callable[[], Made]]] = {
    "Encoders, sequence classification": _each(classifier, _ENCODERS),
    "Decoders, sequence classification": _each(classifier, _DECODERS),
    "Encoder-decoders, sequence classification": _each(classifier, _ENCODER_DECODERS),
    "Causal language models": _each(causal, _CAUSAL),
    "Encoder-decoder language models": _each(seq2seq, _SEQ2SEQ),
    "Other heads of encoders": _OTHERS,
    "Image classification": {name: lambda make=make: images(make()) for name, make in _IMAGES.items()},  # type: ignore[misc]
    "Adapters": _ADAPTERS,
}
