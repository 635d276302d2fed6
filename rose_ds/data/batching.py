"""From texts to padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from datasets import Dataset, concatenate_datasets

from rose_ds.data.tasks import TaskSpec

if TYPE_CHECKING:
    from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

PAD_TO_MULTIPLE_OF = 8
"""Sequence lengths are padded to a multiple of this many tokens, which tensor cores want."""
_ROWS_AT_ONCE = 1000


def tokenize(
    dataset: Dataset,
    spec: TaskSpec,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    order: Sequence[int] | None = None,
) -> Dataset:
    """Tokenize a split: the columns that the tokenizer gives (input_ids, attention_mask, perhaps token_type_ids), and
    `labels`. Rows are truncated to `max_length` tokens and not padded. `order` gives the model's id of each of the
    task's labels, where they differ.

    The result is in memory. Dataset.map would write a cache file for which the ranks of a node race, draw a progress
    bar on each of them, and hash the tokenizer.
    """
    parts = []
    for start in range(0, len(dataset), _ROWS_AT_ONCE):
        rows = dataset[start : start + _ROWS_AT_ONCE]
        encoded = tokenizer(*(rows[field] for field in spec.fields), truncation=True, max_length=max_length)
        labels = rows["label"] if order is None else [order[label] for label in rows["label"]]
        parts.append(Dataset.from_dict({**encoded, "labels": labels}))
    return concatenate_datasets(parts)


def padding_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
    """A collator that pads each batch to its longest row, rounded up to a multiple of PAD_TO_MULTIPLE_OF tokens."""
    from transformers import DataCollatorWithPadding  # here, because it loads torch, which reading data does not need

    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=PAD_TO_MULTIPLE_OF)
