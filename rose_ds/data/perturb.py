"""A perturbed copy of a dev set, with the families of AdvGLUE (Wang et al., NeurIPS 2021) that need no model.

keyboard, swap, drop and homoglyph misspell words as TextBugger does; distractor appends StressTest's tautology; token
adds CheckList's random handle or link. None of them changes what a sentence says, so labels stay.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Sequence

from datasets import Dataset

from rose_ds.data.errors import DataError

MAX_WORDS = 3
"""At most so many words of a text are misspelt, and no more than one in WORDS_PER_EDIT (but at least one)."""
WORDS_PER_EDIT = 8
MIN_LETTERS = 3
"""Shorter words are left alone: one letter more or less makes another word of them ("is", "it", "no")."""

_WORD = re.compile(rf"[^\W\d_]{{{MIN_LETTERS},}}")

NEIGHBOURS = {
    "q": "wa", "w": "qes", "e": "wrd", "r": "etf", "t": "ryg", "y": "tuh", "u": "yij", "i": "uok", "o": "ipl",
    "p": "ol", "a": "qsz", "s": "awdx", "d": "sefc", "f": "drgv", "g": "fthb", "h": "gyjn", "j": "hukm", "k": "jil",
    "l": "ko", "z": "asx", "x": "zsdc", "c": "xdfv", "v": "cfgb", "b": "vghn", "n": "bhjm", "m": "njk",
}  # fmt: skip

# From Unicode's confusables, Cyrillic, Armenian and IPA letters only: mathematical and full-width look-alikes fold
# back to ASCII under NFKC, which many tokenizers apply, and would then change nothing.
_HOMOGLYPHS = {
    "a": "\u0430", "c": "\u0441", "d": "\u0501", "e": "\u0435", "g": "\u0261", "h": "\u04bb", "i": "\u0456",
    "j": "\u0458", "l": "\u04cf", "n": "\u0578", "o": "\u043e", "p": "\u0440", "q": "\u051b", "s": "\u0455",
    "u": "\u057d", "v": "\u0475", "w": "\u051d", "x": "\u0445", "y": "\u0443",
    "A": "\u0410", "B": "\u0412", "C": "\u0421", "E": "\u0415", "H": "\u041d", "I": "\u0406", "J": "\u0408",
    "K": "\u041a", "M": "\u041c", "O": "\u041e", "P": "\u0420", "S": "\u0405", "T": "\u0422", "X": "\u0425",
    "Y": "\u04ae",
}  # fmt: skip

_DISTRACTORS = ("and true is true", "and false is not true", " ".join(["and true is true"] * 5))


# Word families: every spelling that is one edit away. The first letter stays, for readers lean on it.


def _keyboard(word: str) -> list[str]:
    spellings = []
    for i, letter in enumerate(word[1:], start=1):
        for slip in NEIGHBOURS.get(letter.lower(), ""):
            spellings.append(word[:i] + (slip.upper() if letter.isupper() else slip) + word[i + 1 :])
    return spellings


def _swap(word: str) -> list[str]:
    return [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(1, len(word) - 1)]


def _drop(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i in range(1, len(word))]


def _homoglyph(word: str) -> list[str]:
    return [word[:i] + _HOMOGLYPHS[letter] + word[i + 1 :] for i, letter in enumerate(word) if letter in _HOMOGLYPHS]


def _misspell(text: str, rng: random.Random, spellings_of: Callable[[str], list[str]]) -> str:
    """Misspell a few of the longest words that the family can misspell; long words carry the content."""
    words = sorted(_WORD.finditer(text), key=lambda word: (-len(word.group()), word.start()))
    budget = min(MAX_WORDS, max(1, len(words) // WORDS_PER_EDIT))
    longest = words[: 2 * budget]
    rng.shuffle(longest)
    edits: list[tuple[int, int, str]] = []
    for word in longest + words[2 * budget :]:
        if len(edits) == budget:
            break
        # Compared without case, for many tokenizers drop it.
        spellings = [new for new in spellings_of(word.group()) if new.casefold() != word.group().casefold()]
        if spellings:
            edits.append((word.start(), word.end(), rng.choice(spellings)))
    for start, end, spelling in sorted(edits, reverse=True):
        text = text[:start] + spelling + text[end:]
    return text


# Sentence families.


def _distractor(text: str, rng: random.Random) -> str:
    """Before the closing punctuation, as StressTest puts it."""
    body = text.rstrip(" .!?")
    return f"{body} {rng.choice(_DISTRACTORS)}{text[len(body) :]}"


def _token(text: str, rng: random.Random) -> str:
    name = "".join(rng.choices(string.ascii_letters + string.digits, k=6))
    token = rng.choice(["@", "https://t.co/"]) + name
    return f"{token} {text}" if rng.random() < 0.5 else f"{text} {token}"


FAMILIES: dict[str, Callable[[str, random.Random], str]] = {
    "keyboard": lambda text, rng: _misspell(text, rng, _keyboard),
    "swap": lambda text, rng: _misspell(text, rng, _swap),
    "drop": lambda text, rng: _misspell(text, rng, _drop),
    "homoglyph": lambda text, rng: _misspell(text, rng, _homoglyph),
    "distractor": _distractor,
    "token": _token,
}
"""By name, (text, source of randomness) -> perturbed text. A text without a word to misspell comes back as it was."""


def assign_families(n: int, seed: int, families: Sequence[str] | None = None) -> list[str]:
    """The family that `perturb` gives to each of `n` rows; None means all of FAMILIES.

    Every run of len(families) rows has each family once, in a shuffled order, so their counts differ by at most one,
    and a row's family depends on its position, not on how many rows follow.

    Raises:
        DataError: no family, an unknown one, or one given twice.
    """
    names = list(FAMILIES if families is None else families)
    unknown = [name for name in names if name not in FAMILIES]
    if unknown or not names or len(set(names)) < len(names):
        raise DataError(f"families must be different names out of {', '.join(FAMILIES)}; found {names}")
    assigned: list[str] = []
    while len(assigned) < n:
        assigned += random.Random(f"{seed} {len(assigned)}").sample(names, len(names))
    return assigned[:n]


def perturb(dataset: Dataset, fields: Sequence[str], *, seed: int, families: Sequence[str] | None = None) -> Dataset:
    """A copy of `dataset` in which one text of every row is perturbed; columns, labels and order stay.

    In a task with two texts the first is perturbed, as AdvGLUE does more often than not (163 to 122 in its RTE, QNLI
    and QQP dev sets); the second only where the family finds nothing to change in the first. The result depends
    on the seed and on each row's text and position, and on nothing else.

    Args:
        dataset: a split from `load_task`.
        fields: its text columns, `TaskSpec.fields`.
        seed: any integer.
        families: names in FAMILIES; None: all. `assign_families` tells which row gets which.

    Raises:
        DataError: a field is not a column, or `families` is not right.
    """
    missing = [field for field in fields if field not in dataset.column_names]
    if missing:
        raise DataError(f"no column {', '.join(map(repr, missing))} to perturb; found: {dataset.column_names}")
    columns = dataset.to_dict()
    for row, family in enumerate(assign_families(len(dataset), seed, families)):
        # random.Random hashes a text seed with SHA-512, so neither PYTHONHASHSEED nor the process matters.
        rng = random.Random(repr((seed, row, [columns[field][row] for field in fields])))
        for field in fields:
            text = columns[field][row]
            columns[field][row] = FAMILIES[family](text, rng)
            if columns[field][row] != text:
                break
    return Dataset.from_dict(columns, features=dataset.features)
