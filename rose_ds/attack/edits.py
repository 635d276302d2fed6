"""Misspellings of a word, one edit each."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterator

from rose_ds.data.perturb import NEIGHBOURS

WORD = re.compile(r"[^\W\d_]+")


def one_of_each(word: str, rng: random.Random) -> list[tuple[str, int]]:
    """DeepWordBug's four edits of a word at random places, each with its Levenshtein distance: two neighbouring letters
    swapped (2), one replaced, one deleted, one inserted (1 each). A word of one letter is only replaced.
    """
    letters = string.ascii_lowercase
    at = rng.randrange(len(word))
    found = [(word[:at] + rng.choice(letters) + word[at + 1 :], 1)]
    if len(word) > 1:
        at = rng.randrange(len(word) - 1)
        found.append((word[:at] + word[at + 1] + word[at] + word[at + 2 :], 2))
        at = rng.randrange(len(word))
        found.append((word[:at] + word[at + 1 :], 1))
        at = rng.randrange(len(word) + 1)
        found.append((word[:at] + rng.choice(letters) + word[at:], 1))
    return [(new, cost) for new, cost in found if new != word]


def internal(word: str) -> Iterator[str]:
    """Every edit of Pruthi et al. that leaves the first and the last letter: neighbours swapped, a letter dropped, one
    replaced by a neighbour on the keyboard, and any of the alphabet added in each place.
    """
    for i in range(1, len(word) - 2):
        if word[i] != word[i + 1]:
            yield word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    for i in range(1, len(word) - 1):
        yield word[:i] + word[i + 1 :]
        for slip in NEIGHBOURS.get(word[i].lower(), ""):
            yield word[:i] + slip + word[i + 1 :]
    for i in range(1, len(word)):
        for letter in string.ascii_lowercase:
            yield word[:i] + letter + word[i:]
