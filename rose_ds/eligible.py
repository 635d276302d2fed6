"""Which of a model's parameters may be masked, by their names and shapes."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from rose_ds.config import BLOCKS, DEFAULT_INCLUDE, RoseConfig
from rose_ds.errors import RefusedConfiguration

#: A list of blocks counts beside the largest one from this share of its weights on: an encoder and a decoder, say.
_BLOCKS_FROM = 0.2
_DEFAULTS = (DEFAULT_INCLUDE, RoseConfig(strategy="child-tuning").include)
#: The default must find this share of the weights in the model's blocks, or it does not fit the model's names.
_FITS_FROM = 0.9


def eligible_names(config: RoseConfig, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Names that may be masked, in the model's order.

    Args:
        config: its ``include`` and ``exclude`` decide; include="@blocks" is what ``block_patterns`` finds.
        shapes: of the trainable parameters, by name.

    Raises:
        RefusedConfiguration: a pattern matches nothing, nothing is left, or the default finds norms but not the weight
            matrices, as in models whose blocks have other names, or it finds embeddings, whose names have "layer" in
            them too. The message has the setting that does.
    """
    blocks = block_patterns(shapes)
    if BLOCKS in config.include:
        if not blocks:
            raise RefusedConfiguration(
                f'include="{BLOCKS}" finds no numbered list of blocks among the trainable parameters '
                f"({', '.join(list(shapes)[:8])}, ...): set include= to regular expressions for their names"
            )
        include = tuple(p for pattern in config.include for p in (blocks if pattern == BLOCKS else (pattern,)))
        return config.eligible(shapes, include=include)
    advice = f'include="{BLOCKS}" (for this model: {", ".join(blocks)})' if blocks else ""
    try:
        names = config.eligible(shapes)
    except ValueError as error:
        raise RefusedConfiguration(f"{error}; or {advice}" if advice else str(error)) from None
    if config.include in _DEFAULTS and blocks:
        outside = [name for name in names if len(shapes[name]) > 1 and not re.search(r"\.\d+\.", name)]
        embeddings = [name for name in outside if len(shapes[name]) == 2 and re.search("emb|wte|wpe", name.lower())]
        if embeddings:
            raise RefusedConfiguration(
                f"the default include={list(config.include)} would mask this model's embeddings ({embeddings[0]}), "
                "since their names have it too; rows that a batch does not touch would fill what is kept: set "
                f"{advice}, or exclude= to their names"
            )
    if config.include == DEFAULT_INCLUDE and blocks:
        inside = [n for n in config.eligible(shapes, include=blocks) if len(shapes[n]) > 1]
        chosen = set(names)
        missed = [name for name in inside if name not in chosen]
        whole = sum(math.prod(shapes[name]) for name in inside)
        if sum(math.prod(shapes[name]) for name in missed) > (1 - _FITS_FROM) * whole:
            raise RefusedConfiguration(
                f"the default include={list(DEFAULT_INCLUDE)} would leave weight matrices of this model's blocks "
                f"unmasked ({', '.join(missed[:4])}{', ...' if len(missed) > 4 else ''}), because they are named "
                f"otherwise: set {advice}"
            )
    return names


def block_patterns(shapes: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """Patterns for what the default means in BERT, under a model's own names: everything in its numbered blocks but
    biases. Empty where the model has no such lists."""
    sizes: dict[str, int] = defaultdict(int)
    for name, shape in shapes.items():
        found = re.match(r"(.*?)\.\d+\.", name)
        if found and len(shape) > 1:
            sizes[found[1]] += math.prod(shape)
    largest = max(sizes.values(), default=0)
    return tuple(rf"{re.escape(at)}\.\d+\..*(?<!bias)$" for at, size in sizes.items() if size >= _BLOCKS_FROM * largest)
