"""Attacks on a classifier that counts words, so that what they should find is known."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rose_ds.attack import SEARCHES, AttackSettings, attack
from rose_ds.attack.edits import internal, one_of_each
from rose_ds.attack.run import summary
from rose_ds.attack.searches import MAX_DISTANCE
from rose_ds.experiments.resumable import read_log

pytestmark = pytest.mark.fast

Texts = tuple[str, ...]


def logits_of(texts: Sequence[Texts]) -> np.ndarray:
    """Two classes: how many times a text says "bad", and "good" or "excellent" (twice as much)."""
    found = []
    for text in texts:
        words = re.findall(r"\w+", " ".join(text).lower())
        found.append([words.count("bad") + 0.5, words.count("good") + 2 * words.count("excellent")])
    return np.array(found, dtype=np.float32)


class Counting:
    """The classifier, which counts its questions."""

    def __init__(self) -> None:
        self.asked = 0
        self.batches = 0

    def __call__(self, texts: Sequence[Texts]) -> np.ndarray:
        self.asked += len(texts)
        self.batches += 1
        return logits_of(texts)


def row(idx: int, *texts: str, label: int = 1) -> dict[str, Any]:
    return {"idx": idx, "label": label, "texts": texts}


ROWS = [
    row(0, "a good film with music"),
    row(1, "an excellent film, and a good one too"),
    row(2, "a bad film"),  # wrong before
    row(3, "the question is good", "the answer is long"),
    row(4, "a bad and bad film", label=0),
    row(5, "good"),
]


def run(log: Path, rows: Sequence[dict[str, Any]] = ROWS, **settings: Any) -> dict[int, dict[str, Any]]:
    attack(rows, logits_of, AttackSettings(**settings), log)
    return {record["idx"]: record for record in read_log(log) if "idx" in record}


@pytest.mark.parametrize("search", sorted(SEARCHES))
def test_the_important_words_are_found(search: str, tmp_path: Path) -> None:
    found = run(tmp_path / "a.jsonl", search=search, max_words=3)
    assert found[2]["outcome"] == "wrong before"
    assert {i: [word for _, word, _ in found[i]["edits"]] for i in (0, 3, 5)} == {0: ["good"], 3: ["good"], 5: ["good"]}
    assert {word for _, word, _ in found[1]["edits"]} == {"excellent", "good"}
    assert all(found[i]["outcome"] == "broken" for i in (0, 1, 3, 5))
    assert found[4]["outcome"] == "held"  # without a single "good" no misspelling makes the other class likelier
    for i in (0, 1, 3, 5):
        texts = tuple(found[i]["texts"])
        assert logits_of([texts]).argmax() == 0
        assert len(texts) == len(ROWS[i]["texts"])
        assert found[i]["queries"] > len(found[i]["edits"])
    assert found[3]["texts"][1] == "the answer is long"


def test_every_question_is_counted(tmp_path: Path) -> None:
    model = Counting()
    attack(ROWS, model, AttackSettings(search="pruthi"), tmp_path / "a.jsonl")
    assert model.asked == sum(r["queries"] for r in read_log(tmp_path / "a.jsonl") if "idx" in r)
    assert model.batches == 2  # one for the answers before, one for all items' edits


@pytest.mark.parametrize("search", sorted(SEARCHES))
def test_an_item_does_not_depend_on_the_others(search: str, tmp_path: Path) -> None:
    together = run(tmp_path / "together.jsonl", search=search, max_words=2)
    for i in (1, 3):
        assert run(tmp_path / f"{i}.jsonl", [ROWS[i]], search=search, max_words=2)[i] == together[i]
    if search == "deepwordbug":  # the other's best edits here have no random letters
        assert run(tmp_path / "seed.jsonl", search=search, max_words=2, attack_seed=1) != together


def test_limits(tmp_path: Path) -> None:
    assert [o["outcome"] for o in run(tmp_path / "a.jsonl", [ROWS[1]], max_words=1).values()] == ["held"]
    found = run(tmp_path / "b.jsonl", [ROWS[0]], query_budget=10)[0]
    assert (found["outcome"], found["texts"], found["queries"]) == ("budget", ["a good film with music"], 10)
    whole = run(tmp_path / "whole.jsonl", [ROWS[0]], search="pruthi")[0]
    assert whole["outcome"] == "broken"  # by one of the edits of its one question
    part = run(tmp_path / "part.jsonl", [ROWS[0]], search="pruthi", query_budget=whole["queries"] - 1)[0]
    assert part["outcome"] == "broken" and part["queries"] < whole["queries"]
    many = [row(i, "a good film with music") for i in range(300)]  # more than share a batch, all out of budget at once
    assert len(run(tmp_path / "many.jsonl", many, query_budget=2)) == 300
    long = row(0, " ".join(["bad"] * 40), label=0)
    edits = run(tmp_path / "c.jsonl", [long])[0]["edits"]
    assert MAX_DISTANCE / 2 <= len(edits) <= MAX_DISTANCE < 40


def test_edits() -> None:
    for word in ("film", "ab", "a"):
        for new, cost in one_of_each(word, random.Random(0)):
            assert new != word
            assert abs(len(new) - len(word)) <= cost <= 2
    assert len(one_of_each("film", random.Random(0))) == 4
    found = list(internal("movie", random.Random(0)))
    assert len(found) == 2 + 3 + 10 + 4  # swaps, drops, neighbours of o, v and i, insertions
    assert all(new[0] == "m" and new[-1] == "e" and new != "movie" for new in found)
    assert {"mvoie", "moive", "mvie", "movi" + "se"[1:]} & set(found) >= {"mvoie", "moive", "mvie"}


@pytest.mark.parametrize("cut", [0, 1, 25])
def test_a_killed_attack_goes_on(cut: int, tmp_path: Path) -> None:
    """The last line may be half written; nothing is asked twice."""
    whole = run(tmp_path / "whole.jsonl", max_words=2)
    log = tmp_path / "a.jsonl"
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:4]) + lines[4][:cut])
    done = {json.loads(line)["idx"] for line in lines[1:4]}
    model = Counting()
    attack(ROWS, model, AttackSettings(max_words=2), log)
    assert {r["idx"]: r for r in read_log(log) if "idx" in r} == whole
    assert model.asked == sum(r["queries"] for i, r in whole.items() if i not in done)


def test_other_settings_and_damage_are_refused(tmp_path: Path) -> None:
    log = tmp_path / "a.jsonl"
    run(log)
    with pytest.raises(ValueError, match=r"a\.jsonl is of other settings \(max_words None -> 2\)"):
        run(log, max_words=2)
    with pytest.raises(ValueError, match="weights"):
        attack(ROWS, logits_of, AttackSettings(), log, subject={"weights": "abc"})
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], "{", *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not a line of a log"):
        run(log)
    with pytest.raises(ValueError, match=r"search='textfooler' is not one of \['deepwordbug', 'pruthi'\]"):
        AttackSettings(search="textfooler")
    with pytest.raises(ValueError, match="max_words=0 must be at least 1"):
        AttackSettings(max_words=0)


def test_summary(tmp_path: Path) -> None:
    """Over the logs of two ranks."""
    logs = [tmp_path / f"{r}.jsonl" for r in range(2)]
    for r, log in enumerate(logs):
        run(log, ROWS[r::2])
    found = summary(logs)
    assert {name: found[name] for name in ("items", "wrong_before", "broken", "held", "budget")} == {
        "items": 6,
        "wrong_before": 1,
        "broken": 4,
        "held": 1,
        "budget": 0,
    }
    assert (found["clean_accuracy"], found["accuracy_under_attack"]) == (pytest.approx(5 / 6), pytest.approx(1 / 6))
    assert found["success_rate"] == pytest.approx(4 / 5)
    assert found["words"] == pytest.approx((1 + 2 + 1 + 1) / 4)
