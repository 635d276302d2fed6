"""Greedy black-box searches for a misspelling that changes a classifier's answer.

A search is a generator: it yields texts that it wants scored, with what has come of it so far, and is sent a
probability of the right label for each text, so that a driver can put the questions of many items into one batch. It
knows no model.

    deepwordbug  Gao et al., "Black-box Generation of Adversarial Text Sequences to Evade Deep Learning Classifiers",
                 2018: words ranked by the combined head and tail score, the most important first; each gets the best of
                 four random edits, until the answer changes or the edit distance is used up.
    pruthi       Pruthi et al., "Combating Adversarial Misspellings with Robust Word Recognition", ACL 2019: of all
                 internal edits of all words of at least four letters the strongest, at most ``max_words`` times.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

from rose_ds.attack.edits import WORD, internal, one_of_each

Texts = tuple[str, ...]
Scores = list[tuple[float, bool]]
"""Of each text: the probability of the right label, and whether the answer is another one."""
Question = tuple[list[Texts], "Outcome"]
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
    asked: list[Texts] = []
    for word in draft.words:
        asked += [draft.cut(word, slice(0, word.end)), draft.cut(word, slice(0, word.start))]
        asked += [draft.cut(word, slice(word.start, None)), draft.cut(word, slice(word.end, None))]
    scores = yield from _ask(asked, outcome)
    importance = {
        word: sum(scores[4 * i + j][0] * sign for j, sign in enumerate((1, -1, 1, -1)))
        for i, word in enumerate(draft.words)
    }
    left = MAX_DISTANCE
    for word in sorted(draft.words, key=lambda w: -importance[w])[: item.max_words]:
        spellings = [(new, cost) for new, cost in one_of_each(draft.spelling(word), rng) if cost <= left]
        if not spellings:
            continue
        candidates = [draft.with_(word, new) for new, _ in spellings]
        scores = yield from _ask(candidates, outcome)
        best = min(range(len(scores)), key=lambda i: (not scores[i][1], scores[i][0]))
        left -= spellings[best][1]
        _take(outcome, draft, word, spellings[best][0])
        if scores[best][1]:
            outcome.broken = True
            break
    return outcome


def pruthi(item: Item) -> Search:
    """See above; at most one word where ``max_words`` is None, as in their main table's strongest single edit."""
    draft, rng, outcome = _Draft(item.texts), random.Random(item.seed), Outcome(item.texts)
    lowest = float("inf")
    for _ in range(1 if item.max_words is None else item.max_words):
        free = [w for w in draft.words if w not in draft.replaced and w.end - w.start >= MIN_LETTERS]
        options = [(w, new) for w in free for new in dict.fromkeys(internal(draft.spelling(w), rng))]
        if not options:
            break
        scores = yield from _ask([draft.with_(w, new) for w, new in options], outcome)
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
    return (yield list(texts), outcome)


def _take(outcome: Outcome, draft: _Draft, word: _Word, spelling: str) -> None:
    outcome.texts = draft.with_(word, spelling)
    outcome.edits.append((word.text, draft.spelling(word), spelling))
    draft.replaced[word] = spelling
