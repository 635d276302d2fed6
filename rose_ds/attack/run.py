"""Attack every item of a dev set, some hundred at a time, and keep a log from which a killed run goes on."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from rose_ds.attack.searches import SEARCHES, Item, Outcome, Scores, Search, Texts
from rose_ds.experiments.resumable import ResumableLog, digest, records_of

_ACTIVE = 256
"""Items whose questions share batches."""

Predict = Callable[[Sequence[Texts]], np.ndarray]


@dataclass
class AttackSettings:
    """Which attack, and how far it goes."""

    _argument_group_name: ClassVar[str] = "attack"

    search: str = field(
        default="deepwordbug",
        metadata={
            "help": "deepwordbug (Gao et al. 2018: important words first, four random edits each) or pruthi (Pruthi et "
            "al. 2019: the strongest of all internal edits)."
        },
    )
    max_words: int | None = field(
        default=None,
        metadata={"help": "Misspell at most so many words of an item. Default: deepwordbug no limit, pruthi 1."},
    )
    query_budget: int | None = field(
        default=None, metadata={"help": "Ask the model at most so often about an item: of more edits, about the first."}
    )
    attack_seed: int = field(default=0, metadata={"help": "Seed of the random letters."})

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise ValueError(f"search={self.search!r} is not one of {list(SEARCHES)}")
        for name in ("max_words", "query_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")

    def key(self, rows: str) -> str:
        """Of files: the search with a digest of its limits and of the rows."""
        return f"{self.search}-{digest([[rows, *asdict(self).values()]])}"

    def label(self, items: int, rows: str) -> str:
        """What accuracies are comparable under: the search, what limits it, and the rows, by their digest."""
        told = {"max_words": self.max_words, "query_budget": self.query_budget, "seed": self.attack_seed or None}
        limits = "".join(f", {name} {value}" for name, value in told.items() if value is not None)
        return f"{self.search}{limits}, {items} items {rows}"


@dataclass
class _Active:
    row: dict[str, Any]
    search: Search
    asked: list[Texts]
    queries: int = 0
    """Asked so far."""
    unasked: int = 0
    """Of the search's last question, by the budget."""


def attack(
    rows: Iterable[dict[str, Any]],
    predict: Predict,
    settings: AttackSettings,
    log: Path,
    *,
    subject: Mapping[str, Any] | None = None,
    progress: tqdm[Any] | None = None,
) -> None:
    """Attack rows, and write a line for each to ``log`` as it ends; rows that the log has already are left out.

    Args:
        rows: each with ``idx``, ``label`` (an id) and ``texts``, a tuple of one or two strings.
        predict: texts -> logits (texts, classes).
        subject: what is attacked, in words that the log keeps.

    Raises:
        ValueError: the log is of other settings or another subject, or damaged before its last line.
    """
    rows = list(rows)
    with ResumableLog(log, {**(subject or {}), **asdict(settings)}) as lines:
        done = {record["idx"] for record in lines.records}
        waiting = (row for row in rows if row["idx"] not in done)
        if progress is not None:
            progress.update(sum(row["idx"] in done for row in rows))

        def ended(row: dict[str, Any], **record: Any) -> None:
            lines.append({"idx": row["idx"], "label": row["label"], **record})
            if progress is not None:
                progress.update()

        active: list[_Active] = []
        while True:
            taken = list(islice(waiting, _ACTIVE - len(active)))
            active += _begin(taken, predict, settings, ended)
            if active:
                active = _round(active, predict, settings, ended)
            elif not taken:
                return


def _begin(
    rows: list[dict[str, Any]], predict: Predict, settings: AttackSettings, ended: Callable[..., None]
) -> list[_Active]:
    """Start attacks on rows whose answer is right; the others need none."""
    if not rows:
        return []
    answers = predict([row["texts"] for row in rows]).argmax(axis=1)
    started = []
    for row, answer in zip(rows, answers, strict=True):
        if answer != row["label"]:
            ended(row, outcome="wrong before", queries=1, edits=[], texts=list(row["texts"]))
            continue
        seed = settings.attack_seed * 2**32 + row["idx"]
        search = SEARCHES[settings.search](Item(row["texts"], seed, settings.max_words))
        one = _Active(row, search, [], queries=1)
        if _advance(one, None, settings, ended):
            started.append(one)
    return started


def _round(
    active: list[_Active], predict: Predict, settings: AttackSettings, ended: Callable[..., None]
) -> list[_Active]:
    """Answer every search's question in one batch; those that go on."""
    logits = predict([texts for one in active for texts in one.asked]).astype(np.float64)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    odds /= odds.sum(axis=1, keepdims=True)
    going, start = [], 0
    for one in active:
        part = slice(start, start := start + len(one.asked))
        label = one.row["label"]
        flipped = logits[part].argmax(axis=1) != label
        scores = list(zip(odds[part, label].tolist(), flipped.tolist(), strict=True))
        scores += [(1.0, False)] * one.unasked  # nothing that a search would choose
        if _advance(one, scores, settings, ended):
            going.append(one)
    return going


def _advance(one: _Active, scores: Scores | None, settings: AttackSettings, ended: Callable[..., None]) -> bool:
    """Send a search its answers; whether it has another question, of which the budget allows a part."""
    try:
        question = one.search.send(scores) if scores is not None else next(one.search)
    except StopIteration as end:
        outcome: Outcome = end.value
        said = "broken" if outcome.broken else "budget" if one.unasked else "held"
        ended(one.row, outcome=said, queries=one.queries, edits=outcome.edits, texts=list(outcome.texts))
        return False
    left = len(question) if settings.query_budget is None else settings.query_budget - one.queries
    one.asked, one.unasked = question[:left], len(question[left:])
    if not one.asked:
        one.search.close()
        ended(one.row, outcome="budget", queries=one.queries, edits=[], texts=list(one.row["texts"]))
        return False
    one.queries += len(one.asked)
    return True


# --- what came of it ---


def summary(logs: Sequence[Path]) -> dict[str, Any]:
    """What came of an attack, over the logs of all ranks.

    Returns:
        ``clean_accuracy`` and ``accuracy_under_attack``, fractions of all items; ``success_rate``, of the items that
        were right before; ``queries`` and ``words``, means over attacked and over broken items.
    """
    items = {r["idx"]: r for r in records_of(logs)}
    counts = {name: sum(r["outcome"] == name for r in items.values()) for name in _OUTCOMES}
    attacked = len(items) - counts["wrong before"]
    broken = [r for r in items.values() if r["outcome"] == "broken"]
    queries = [r["queries"] for r in items.values() if r["outcome"] != "wrong before"]
    return {
        "items": len(items),
        **{name.replace(" ", "_"): count for name, count in counts.items()},
        "clean_accuracy": attacked / len(items),
        "accuracy_under_attack": (attacked - counts["broken"]) / len(items),
        "success_rate": counts["broken"] / attacked if attacked else None,
        "queries": statistics.fmean(queries) if queries else None,
        "words": statistics.fmean(len(r["edits"]) for r in broken) if broken else None,
    }


_OUTCOMES = ("wrong before", "broken", "held", "budget")
