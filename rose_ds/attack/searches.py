"""Greedy black-box searches for a misspelling that changes a classifier's answer.

A search is a generator: it yields texts that it wants scored, with what has come of it so far, and is sent a
probability of the right label for each text, so that a driver can put the questions of many items into one batch. It
knows no model.

    deepwordbug  Gao et al., "Black-box Generation of Adversarial Text Sequences to Evade Deep Learning Classifiers",
                 2018: words ranked by the combined head and tail score, the most important first; each gets the best of
                 four random edits (theirs are of one kind), until the answer changes or the edit distance is used up.
                 Words that the model does not read, since the text is cut before them, are left alone.
    pruthi       Pruthi et al., "Combating Adversarial Misspellings with Robust Word Recognition", ACL 2019: of all
                 internal edits of all words of at least four letters the strongest, at most ``max_words`` times.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from rose_ds.attack.edits import WORD, internal, one_of_each

Texts = tuple[str, ...]
Scores = list[tuple[float, bool]]
"""Of each text: the probability of the right label, and whether the answer is another one."""
Question = tuple[Sequence[Texts], "Outcome"]
"""Texts to be scored, and the outcome so far, for a driver that ends the search here."""
Search = Generator[Question, Scores, "Outcome"]

#: DeepWordBug's limit.
MAX_DISTANCE = 30
#: Shorter words are left alone by Pruthi's.
MIN_LETTERS = 4


@dataclass(frozen=True)
class Item:
    """What is attacked: one or two texts, and where random letters come from."""

    texts: Texts
    seed: int = 0
    probability: float = 1.0
    """Of the right label, before any edit."""
    max_words: int | None = None
    """Most words to misspell; None: the search's own limit."""


@dataclass
class Outcome:
    """What came of it."""

    texts: Texts
    """With the edits, also where they did not suffice."""
    broken: bool = False
    edits: list[tuple[int, str, str]] = field(default_factory=list)
    """(number of the text, word, its misspelling), in the order they were made."""


@dataclass(frozen=True)
class _Word:
    """A word's place in the original texts."""

    text: int
    start: int
    end: int


class _Made(Sequence[Texts]):
    """Texts that are made when they are looked at: a long text's, all together, would not fit into memory."""

    def __init__(self, make: Callable[..., Texts], of: Sequence[tuple[Any, ...]]) -> None:
        self._make, self._of = make, of

    def __len__(self) -> int:
        return len(self._of)

    @overload
    def __getitem__(self, at: int) -> Texts: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Texts]: ...
    def __getitem__(self, at: int | slice) -> Texts | Sequence[Texts]:
        return _Made(self._make, self._of[at]) if isinstance(at, slice) else self._make(*self._of[at])


class _Draft:
    """The texts with some words replaced."""

    def __init__(self, texts: Texts) -> None:
        self.texts = texts
        self.words = [_Word(i, m.start(), m.end()) for i, text in enumerate(texts) for m in WORD.finditer(text)]
        self.replaced: dict[_Word, str] = {}

    def spelling(self, word: _Word) -> str:
        return self.texts[word.text][word.start : word.end]

    def with_(self, word: _Word, spelling: str) -> Texts:
        """The texts with one more word replaced."""
        found = list(self.texts)
        chosen = {**self.replaced, word: spelling}
        for w in sorted(chosen, key=lambda w: w.start, reverse=True):
            found[w.text] = found[w.text][: w.start] + chosen[w] + found[w.text][w.end :]
        return tuple(found)

    def cut(self, word: _Word, piece: slice) -> Texts:
        """The texts with only a part of the one that a word stands in."""
        return tuple(text[piece] if i == word.text else text for i, text in enumerate(self.texts))


def deepwordbug(item: Item) -> Search:
    """See above."""
    draft, rng, outcome = _Draft(item.texts), random.Random(item.seed), Outcome(item.texts)
    pieces = [
        (word, piece)
        for word in draft.words
        for piece in (slice(word.end), slice(word.start), slice(word.start, None), slice(word.end, None))
    ]
    scores = yield from _ask(_Made(draft.cut, pieces), outcome)
    of_word = {word: [p for p, _ in scores[4 * i : 4 * i + 4]] for i, word in enumerate(draft.words)}
    importance = {word: to - before + since - after for word, (to, before, since, after) in of_word.items()}
    ranked = sorted(_read(draft.words, of_word), key=lambda w: -importance[w])
    left = MAX_DISTANCE
    for word in ranked[: item.max_words]:
        spellings = [(new, cost) for new, cost in one_of_each(draft.spelling(word), rng) if cost <= left]
        if not spellings:
            continue
        scores = yield from _ask([draft.with_(word, new) for new, _ in spellings], outcome)
        best = min(range(len(scores)), key=lambda i: (not scores[i][1], scores[i][0]))
        left -= spellings[best][1]
        _take(outcome, draft, word, spellings[best][0])
        if scores[best][1]:
            outcome.broken = True
            break
    return outcome


def pruthi(item: Item) -> Search:
    """See above; at most one word where ``max_words`` is None, as in their main table's strongest single edit."""
    draft, outcome, lowest = _Draft(item.texts), Outcome(item.texts), item.probability
    for _ in range(1 if item.max_words is None else item.max_words):
        free = [w for w in draft.words if w not in draft.replaced and w.end - w.start >= MIN_LETTERS]
        options = [(w, new) for w in free for new in dict.fromkeys(internal(draft.spelling(w)))]
        if not options:
            break
        scores = yield from _ask(_Made(draft.with_, options), outcome)
        best = min(range(len(scores)), key=lambda i: (not scores[i][1], scores[i][0]))
        if not scores[best][1] and scores[best][0] >= lowest:
            break  # no edit makes the answer less sure
        lowest = scores[best][0]
        _take(outcome, draft, *options[best])
        if scores[best][1]:
            outcome.broken = True
            break
    return outcome


#: By name.
SEARCHES: dict[str, Callable[[Item], Search]] = {"deepwordbug": deepwordbug, "pruthi": pruthi}


def _ask(texts: Sequence[Texts], outcome: Outcome) -> Generator[Question, Scores, Scores]:
    """Scores of texts, in their order; what is empty or asked twice is a question too."""
    if not texts:
        return []
    return (yield texts, outcome)


#: Alike texts of two batches may differ by such a part of how unsure the answer is, or of how sure.
_ROUNDING = 1e-4


def _read(words: Sequence[_Word], of_word: Mapping[_Word, Sequence[float]]) -> list[_Word]:
    """The words without those at a text's end that change nothing in the text up to them: it is cut before them."""
    read: list[_Word] = []
    last = set[int]()
    for word in reversed(words):
        to, before, _, _ = of_word[word]
        if abs(to - before) > _ROUNDING * min(to, 1 - to) or word.text in last:
            last.add(word.text)
            read.append(word)
    return read[::-1]


def _take(outcome: Outcome, draft: _Draft, word: _Word, spelling: str) -> None:
    outcome.texts = draft.with_(word, spelling)
    outcome.edits.append((word.text, draft.spelling(word), spelling))
    draft.replaced[word] = spelling
