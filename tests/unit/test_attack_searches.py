"""Attacks on a classifier that counts words, so that what they should find is known."""

from __future__ import annotations

import io
import json
import random
import re
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tqdm import tqdm

from rose_ds import cli
from rose_ds.attack import SEARCHES, AttackSettings, PlannedAttack, attack
from rose_ds.attack.edits import internal, one_of_each
from rose_ds.attack.run import summary
from rose_ds.attack.searches import MAX_DISTANCE, Item, Search
from rose_ds.cli.arguments import Parser
from rose_ds.experiments.evaluation import expected_calibration_error
from rose_ds.experiments.resumable import read_log
from rose_ds.experiments.settings import RunSettings

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
    """The classifier, which counts its questions, and is killed at one of them."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.asked = 0
        self.most = 0
        self.batches = 0
        self.killed_at = killed_at

    def __call__(self, texts: Sequence[Texts]) -> np.ndarray:
        self.asked += len(texts)
        self.most = max(self.most, len(texts))
        self.batches += 1
        if self.killed_at is not None and self.asked >= self.killed_at:
            raise KeyboardInterrupt
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
    attack(ROWS, model, AttackSettings(search="pruthi"), tmp_path / "a.jsonl", at_once=10_000)
    assert model.asked == sum(r["queries"] for r in read_log(tmp_path / "a.jsonl") if "idx" in r)
    assert model.batches == 2  # one for the answers before, one for all items' edits


@pytest.mark.parametrize("at_once", [1, 7, 30])
@pytest.mark.parametrize("search", sorted(SEARCHES))
def test_a_round_is_bounded_and_changes_nothing(search: str, at_once: int, tmp_path: Path) -> None:
    """Also where one item's question is longer than a round, and where the budget ends within it."""
    for budget in (None, 45):
        settings = AttackSettings(search=search, max_words=2, query_budget=budget)
        whole, model = run(tmp_path / f"{budget}.jsonl", **vars(settings)), Counting()
        log = tmp_path / f"{budget}-{at_once}.jsonl"
        attack(ROWS, model, settings, log, at_once=at_once)
        assert {r["idx"]: r for r in read_log(log) if "idx" in r} == whole
        assert model.asked == sum(r["queries"] for r in whole.values())
        assert model.most == at_once < max(r["queries"] for r in whole.values())


def test_a_kill_loses_little(tmp_path: Path) -> None:
    """Of many items whose whole search is one question."""
    rows = [row(i, "a good film with music") for i in range(40)]
    settings, log, at_once = AttackSettings(search="pruthi"), tmp_path / "a.jsonl", 100
    whole = run(tmp_path / "whole.jsonl", rows, search="pruthi")
    total, one = sum(r["queries"] for r in whole.values()), max(r["queries"] for r in whole.values())
    killed, again = Counting(killed_at=total // 2), Counting()
    with pytest.raises(KeyboardInterrupt):
        attack(rows, killed, settings, log, at_once=at_once)
    attack(rows, again, settings, log, at_once=at_once)
    assert {r["idx"]: r for r in read_log(log) if "idx" in r} == whole
    assert killed.asked + again.asked - total <= len(rows) + at_once + 2 * one  # answers before, a round, what is begun


def test_a_search_begins_when_its_question_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The questions of all items at once would not fit into memory."""
    under_way, most, pruthi = set[Texts](), 0, SEARCHES["pruthi"]

    def watched(item: Item) -> Search:
        nonlocal most
        under_way.add(item.texts)
        most = max(most, len(under_way))
        outcome = yield from pruthi(item)
        under_way.remove(item.texts)
        return outcome

    monkeypatch.setitem(SEARCHES, "pruthi", watched)
    rows = [row(i, f"{'a' * i} good film with music") for i in range(4)]
    rows += [row(i, f"{'the' * i} good film with music") for i in range(4, 30)]
    attack(rows, logits_of, AttackSettings(search="pruthi"), tmp_path / "a.jsonl", at_once=100)
    assert 1 < most <= 4  # of 40 questions at least


def test_the_bar_moves_while_an_item_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[tuple[int, int]]()
    with tqdm(total=1, file=io.StringIO()) as bar:
        monkeypatch.setattr(bar, "set_postfix", lambda questions: told.append((bar.n, questions)))
        attack([ROWS[0]], logits_of, AttackSettings(search="pruthi"), tmp_path / "a.jsonl", at_once=20, progress=bar)
        assert bar.n == 1
    assert told[:3] == [(0, 1), (0, 21), (0, 41)]
    with pytest.raises(ValueError, match="at_once=0 must be at least 1"):
        attack(ROWS, logits_of, AttackSettings(), tmp_path / "b.jsonl", at_once=0)


@pytest.mark.parametrize("search", sorted(SEARCHES))
def test_an_item_does_not_depend_on_the_others(search: str, tmp_path: Path) -> None:
    together = run(tmp_path / "together.jsonl", search=search, max_words=2)
    for i in (1, 3):
        assert run(tmp_path / f"{i}.jsonl", [ROWS[i]], search=search, max_words=2)[i] == together[i]
    if search == "deepwordbug":  # the other's best edits here have no random letters
        assert run(tmp_path / "seed.jsonl", search=search, max_words=2, attack_seed=1) != together


@pytest.mark.parametrize("search", sorted(SEARCHES))
def test_words_that_are_not_read_are_left_alone(search: str, tmp_path: Path) -> None:
    """A text longer than the model reads is as easy to break as its beginning."""

    def reads(texts: Sequence[Texts]) -> np.ndarray:
        return logits_of([tuple(" ".join(text.split()[:8]) for text in row) for row in texts])

    begin = "a good film with music and a cast"
    rows = [row(0, begin), row(1, begin + " good bad film" * 60)]
    attack(rows, reads, AttackSettings(search=search, max_words=3), tmp_path / "a.jsonl")
    short, long = [record for record in read_log(tmp_path / "a.jsonl") if "idx" in record]
    assert short["outcome"] == long["outcome"] == "broken"
    assert [word for _, word, _ in short["edits"]] == [word for _, word, _ in long["edits"]] == ["good"]
    if search == "deepwordbug":
        assert long["texts"][0].endswith(rows[1]["texts"][0][len(begin) :])


def test_what_makes_an_answer_surer_is_no_edit(tmp_path: Path) -> None:

    def surer_of_misspellings(texts: Sequence[Texts]) -> np.ndarray:
        return np.array([[0.0, 1.0 + (text != ("a fine film",))] for text in texts])

    settings = AttackSettings(search="pruthi", max_words=3)
    attack([row(0, "a fine film")], surer_of_misspellings, settings, tmp_path / "a.jsonl")
    (found,) = (record for record in read_log(tmp_path / "a.jsonl") if "idx" in record)
    assert (found["outcome"], found["edits"], found["texts"]) == ("held", [], ["a fine film"])


def test_a_long_text_takes_little_memory(tmp_path: Path) -> None:
    """All of its misspellings at once would be 30,000 texts of 8,000 letters."""
    text = "word " * 1600
    tracemalloc.start()
    try:
        for search in SEARCHES:
            settings = AttackSettings(search=search, query_budget=200)
            attack([row(0, text + "good")], logits_of, settings, tmp_path / search)
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


def test_limits(tmp_path: Path) -> None:
    assert [o["outcome"] for o in run(tmp_path / "a.jsonl", [ROWS[1]], max_words=1).values()] == ["held"]
    found = run(tmp_path / "b.jsonl", [ROWS[0]], query_budget=10)[0]
    assert (found["outcome"], found["texts"], found["queries"]) == ("budget", ["a good film with music"], 10)
    found = run(tmp_path / "edits.jsonl", [ROWS[1]], query_budget=1 + 4 * 8 + 4)[
        1
    ]  # 8 words ranked, one of them edited
    ((_, word, misspelling),) = found["edits"]
    assert (found["outcome"], word) == ("budget", "excellent")
    assert found["texts"] == [ROWS[1]["texts"][0].replace(word, misspelling)]
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
    found = list(internal("movie"))
    assert len(found) == 2 + 3 + 10 + 4 * 26  # swaps, drops, neighbours of o, v and i, insertions
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
    logits, labels = logits_of([r["texts"] for r in ROWS]), np.array([r["label"] for r in ROWS])
    assert found["clean_ece"] == pytest.approx(expected_calibration_error(logits, labels), abs=1e-4)
    assert found["clean_ece"] > 0.1  # the classifier counts, and is not sure of one word

    settings, *records = read_log(logs[0])
    del records[0]["logits"]  # as earlier versions wrote it
    logs[0].write_text("".join(json.dumps(line) + "\n" for line in (settings, *records)))
    assert summary(logs) == {**found, "clean_ece": None}


@pytest.mark.parametrize(
    ("settings", "words", "name"),
    [
        ({"search": "pruthi"}, ["--search", "pruthi"], "pruthi 2"),
        (
            {"max_words": 3, "query_budget": 50, "attack_seed": 1},
            ["--search", "deepwordbug", "--max_words", "3", "--query_budget", "50", "--attack_seed", "1"],
            "deepwordbug 2, max_words 3, query_budget 50, seed 1",
        ),
    ],
)
def test_a_planned_attack(settings: dict[str, Any], words: list[str], name: str) -> None:
    """Its words mean the same to ``rose-ds attack``, and it knows its own figures."""
    plan = PlannedAttack(AttackSettings(**settings), 8)
    assert plan.words(5) == [*words, "--max_eval_samples", "5"]  # of a dev set that has no more
    assert plan.words(9) == [*words, "--max_eval_samples", "8"]
    run, how = Parser("attack", "", RunSettings, AttackSettings).settings(plan.words(9))
    assert (how, run.max_eval_samples) == (plan.settings, 8)
    assert plan.settings.label(5, "ab12") == f"{name}, 5 items ab12"
    labels = ["other, 8 items 99", plan.settings.label(5, "ab12")]
    assert plan.made(labels, 5) and not plan.made(labels, 6)  # of a dev set that has no more, and of one that has
    assert not plan.made([AttackSettings(**{**settings, "max_words": 2}).label(8, "ab12")], 100)
    assert not plan.made([], 100)


def test_attacks_that_cannot_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="attack_items=0 must be at least 1"):
        PlannedAttack(AttackSettings(), 0)
    for flag in ("max_eval_samples", "query_budget", "batch_size"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["attack", "--model", "nowhere", f"--{flag}", "0"])
        assert stop.value.code == 2
        assert f"rose-ds attack: error: {flag}=0 must be at least 1" in capsys.readouterr().err
