"""Attack every item of a dev set, questions of many items at a time, and keep a log from which a killed run goes on."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rose_ds.attack.searches import SEARCHES, Item, Outcome, Scores, Search, Texts
from rose_ds.attack.settings import AttackSettings
from rose_ds.experiments.evaluation import answers, expected_calibration_error
from rose_ds.experiments.resumable import ResumableLog, records_of

Predict = Callable[[Sequence[Texts]], np.ndarray]


@dataclass
class _Active:
    row: dict[str, Any]
    search: Search
    logits: list[float]
    """Of the texts as they are."""
    outcome: Outcome
    """So far."""
    asked: Sequence[Texts] = ()
    """The search's last question, as far as the budget allows it."""
    unasked: int = 0
    """The rest of it."""
    scores: Scores = field(default_factory=list)
    """Of the first of ``asked``."""
    queries: int = 1

    @property
    def unanswered(self) -> int:
        return len(self.asked) - len(self.scores)

    def record(self, said: str) -> dict[str, Any]:
        """The log's line."""
        outcome = self.outcome
        return _record(self.row, said, self.queries, self.logits, edits=outcome.edits, texts=list(outcome.texts))


def _record(row: dict[str, Any], said: str, queries: int, logits: list[float], **more: Any) -> dict[str, Any]:
    return {"idx": row["idx"], "label": row["label"], "outcome": said, "queries": queries, "logits": logits, **more}


def attack(
    rows: Iterable[dict[str, Any]],
    predict: Predict,
    settings: AttackSettings,
    log: Path,
    *,
    subject: Mapping[str, Any] | None = None,
    at_once: int = 1280,
    progress: tqdm[Any] | None = None,
) -> None:
    """Attack rows, and write a line for each to ``log`` as it ends; rows that the log has already are left out.

    Args:
        rows: each with ``idx``, ``label`` (an id) and ``texts``, a tuple of one or two strings.
        predict: texts -> logits (texts, classes).
        subject: what is attacked, in words that the log keeps.
        at_once: most texts that ``predict`` is given; a longer question of a search is asked in pieces. Another item is
            begun only where fewer wait for an answer, so it bounds memory, and what a kill loses.
        progress: counts items, and tells how many texts have been asked about.

    Raises:
        ValueError: the log is of other settings or another subject, or damaged before its last line; ``at_once`` < 1.
    """
    if at_once < 1:
        raise ValueError(f"at_once={at_once} must be at least 1")
    rows = list(rows)
    with ResumableLog(log, {**(subject or {}), **asdict(settings)}) as lines:
        done = {record["idx"] for record in lines.records}
        if progress is not None:
            progress.update(sum(row["idx"] in done for row in rows))
        asked = 0

        def ask(texts: Sequence[Texts]) -> np.ndarray:
            nonlocal asked
            logits = predict(texts).astype(np.float64)
            asked += len(texts)
            if progress is not None:
                progress.set_postfix(questions=asked)
            return logits

        def ended(record: dict[str, Any]) -> None:
            lines.append(record)
            if progress is not None:
                progress.update()

        starting = _begin((row for row in rows if row["idx"] not in done), ask, settings, at_once, ended)
        active: list[_Active] = []
        while True:
            waiting = sum(one.unanswered for one in active)
            while waiting < at_once and (new := next(starting, None)) is not None:
                active.append(new)
                waiting += new.unanswered
            if not active:
                return
            active = _round(active, ask, settings, at_once, ended)


_Ended = Callable[[dict[str, Any]], None]


def _begin(
    rows: Iterator[dict[str, Any]], ask: Predict, settings: AttackSettings, at_once: int, ended: _Ended
) -> Iterator[_Active]:
    """Searches of the rows whose answer is right, each begun when it is wanted; the others need none."""
    while part := list(islice(rows, at_once)):
        for row, logits in zip(part, ask([row["texts"] for row in part]), strict=True):
            kept = [round(value, 4) for value in logits.tolist()]
            if answers(logits) != row["label"]:
                ended(_record(row, "wrong before", 1, kept, edits=[], texts=list(row["texts"])))
                continue
            seed = settings.attack_seed * 2**32 + row["idx"]
            item = Item(row["texts"], seed, float(_odds(logits)[row["label"]]), settings.max_words)
            search = SEARCHES[settings.search](item)
            one = _Active(row, search, kept, Outcome(row["texts"]))
            if _advance(one, settings, ended):
                yield one


def _round(active: list[_Active], ask: Predict, settings: AttackSettings, at_once: int, ended: _Ended) -> list[_Active]:
    """Put questions, those of the items that were begun first; the searches that go on."""
    texts: list[Texts] = []
    counts = []
    for one in active:
        done = len(one.scores)
        part = one.asked[done : done + at_once - len(texts)]
        texts += part
        counts.append(len(part))
    logits = ask(texts)
    odds = _odds(logits)
    going, start = [], 0
    for one, count in zip(active, counts, strict=True):
        own, label = slice(start, start := start + count), one.row["label"]
        flipped = answers(logits[own]) != label
        one.scores += zip(odds[own, label].tolist(), flipped.tolist(), strict=True)
        if one.unanswered or _advance(one, settings, ended):
            going.append(one)
    return going


def _odds(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits (..., classes)."""
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(odds / odds.sum(axis=-1, keepdims=True))


def _advance(one: _Active, settings: AttackSettings, ended: _Ended) -> bool:
    """Send a search its answers; whether it has another question, of which the budget allows a part."""
    scores = one.scores + [(1.0, False)] * one.unasked  # nothing that a search would choose
    try:
        question, one.outcome = one.search.send(scores) if scores else next(one.search)
    except StopIteration as end:
        one.outcome = end.value
        ended(one.record("broken" if one.outcome.broken else "budget" if one.unasked else "held"))
        return False
    left = len(question) if settings.query_budget is None else settings.query_budget - one.queries
    one.asked, one.unasked, one.scores = question[:left], len(question[left:]), []
    if not one.asked:
        one.search.close()
        ended(one.record("budget"))
        return False
    one.queries += len(one.asked)
    return True


# --- what came of it ---


def summary(logs: Sequence[Path]) -> dict[str, Any]:
    """What came of an attack, over the logs of all ranks.

    Returns:
        ``clean_accuracy`` and ``accuracy_under_attack``, fractions of all items; ``clean_ece``, the expected
        calibration error before the attack, a fraction (None where an earlier version's log lacks the logits);
        ``success_rate``, of the items that were right before; ``queries`` and ``words``, means over attacked and over
        broken items.
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
        "clean_ece": _calibration_error(list(items.values())),
        "accuracy_under_attack": (attacked - counts["broken"]) / len(items),
        "success_rate": counts["broken"] / attacked if attacked else None,
        "queries": statistics.fmean(queries) if queries else None,
        "words": statistics.fmean(len(r["edits"]) for r in broken) if broken else None,
    }


_OUTCOMES = ("wrong before", "broken", "held", "budget")


def _calibration_error(records: Sequence[Mapping[str, Any]]) -> float | None:
    if not all("logits" in r for r in records):
        return None
    labels, logits = np.array([r["label"] for r in records]), np.array([r["logits"] for r in records])
    return expected_calibration_error(logits, labels) if np.isfinite(logits).all() else None
