"""Rows without a label, the classes of a file, and the rows set aside where no validation file is given."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from rose_ds.data import DataError, perturb
from rose_ds.data.files import Files, load_files, with_adversarial

pytestmark = pytest.mark.fast


def csv(path: Path, *labels: Any) -> Path:
    path.write_text("text,label\n" + "".join(f"t{i},{label}\n" for i, label in enumerate(labels)))
    return path


def jsonl(path: Path, *labels: Any) -> Path:
    rows = ({"text": f"t{i}", "label": label} for i, label in enumerate(labels))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- classes ---


def test_the_log_has_each_files_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, dev = csv(tmp_path / "train.csv", "pos", "neg", "odd", "pos"), csv(tmp_path / "dev.csv", "neg", "pos", "neg")
    with caplog.at_level("INFO", "rose_ds.data.labels"):
        load_files(Files(train=train, validation=dev, adversarial=jsonl(tmp_path / "hard.jsonl", "odd")))
    assert [record.getMessage() for record in caplog.records] == [
        f"{train}: 4 rows by label: 1 'neg', 1 'odd', 2 'pos'",
        f"{dev}: 3 rows by label: 2 'neg', 0 'odd', 1 'pos'",
        f"{tmp_path}/hard.jsonl: 1 rows by label: 0 'neg', 1 'odd', 0 'pos'",
    ]


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ((0, 1, 2, -1, -1), "is -1 in 2 rows and 0 to 2 in the others"),
        ((0, 1, -1), "is -1 in 1 rows and 0 to 1 in the others"),  # moods, perhaps: still three classes
        (("0.0", "1.0", "-1.0"), "is -1 in 1 rows and 0 to 1 in the others"),
        ((0, -1), None),
        ((1, -1), None),
        ((1, 2, -1), None),
        ((0, 2, -1), None),
        ((0, 1, -1, -2), None),
        (("a", "b", "-1"), None),
    ],
)
def test_minus_one_beside_ids_is_told(
    labels: tuple[Any, ...], told: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = jsonl(tmp_path / "a.jsonl", *labels)
    data = load_files(Files(validation=path))
    assert len(data.spec.labels) == len(set(labels)) and len(data.validation or ()) == len(labels)
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == (told is not None)
    assert told is None or (f"{path}: 'label' {told}" in found[0] and "--drop_unlabelled" in found[0])


# --- rows without a label ---


@pytest.mark.parametrize("empty", [-1, None, "", "  ", "-1", "-1.0", float("nan")])
def test_rows_without_a_label_are_dropped(empty: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = jsonl(tmp_path / "a.jsonl", 1, empty, 0, 10, empty)
    with caplog.at_level("INFO", "rose_ds.data.labels"):
        data = load_files(Files(validation=path, drop_unlabelled=True))
    assert data.validation is not None
    assert (data.validation["text"], data.validation["label"]) == (["t0", "t2", "t3"], [1, 0, 2])
    assert (data.validation["idx"], data.spec.labels) == ([0, 1, 2], ("0", "1", "10"))
    dropped = [text for record in caplog.records if "dropped" in (text := record.getMessage())]
    assert dropped == [f"{path}: 2 of 5 rows are dropped, whose label in 'label' is empty or -1"]


def test_every_file_is_read_alike(tmp_path: Path) -> None:
    """The dev and the adversarial set too, against a training file's labels, a trained model's and GLUE's."""
    train, odd = csv(tmp_path / "train.csv", "a", "b"), csv(tmp_path / "odd.csv", "b", "-1", "a")
    data = load_files(Files(train=train, validation=odd, adversarial=odd, drop_unlabelled=True))
    assert data.validation is not None and data.adversarial is not None
    assert data.validation["label"] == data.adversarial["label"] == [1, 0]
    with pytest.raises(DataError, match=r"odd\.csv:3: label '-1' is not one of 'a', 'b': --drop_unlabelled leaves"):
        load_files(Files(train=train, validation=odd))
    ids = csv(tmp_path / "ids.csv", "1", "-1")
    for task, labels in ((None, ("no", "yes")), ("sst2", None)):
        columns = ("text",)
        files = Files(validation=ids, text_columns=columns, drop_unlabelled=True)
        found = load_files(files, task, labels)
        assert found.validation is not None and found.validation["label"] == [1]
        hard = with_adversarial(found, Files(adversarial=ids, text_columns=columns, drop_unlabelled=True))
        assert hard.adversarial is not None and hard.adversarial["label"] == [1]
        with pytest.raises(DataError, match=r"ids\.csv:3: label '-1' .*: --drop_unlabelled leaves"):
            load_files(Files(validation=ids, text_columns=columns), task, labels)


def test_no_label_is_an_error_that_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv:3: no label in 'label': --drop_unlabelled leaves such rows out"):
        load_files(Files(validation=csv(tmp_path / "a.csv", "a", "", "b")))
    with pytest.raises(DataError, match=r"a\.csv:3: label 'c' is not one of 'a', 'b'$"):  # has one: no way out
        load_files(Files(validation=csv(tmp_path / "a.csv", "a", "c")), labels=("a", "b"))
    with pytest.raises(DataError, match=r"a\.csv: no row has a label in 'label'"):
        load_files(Files(validation=csv(tmp_path / "a.csv", "-1", ""), drop_unlabelled=True))


def test_unlabelled_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Ids by the data set's own names; -1 is none of them, though a name may be."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["-1", "yes"])})
    rows = {"text": ["t0", "t1", "t2", "t3"], "label": [0, -1, None, 1]}
    some = Dataset.from_dict(rows, features=features)
    served = {"train": some, "validation": some.select([1, 3])}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: served)
    with pytest.raises(DataError, match=r"snli\[train\]: row 2: no label in 'label' \(-1\): --drop_unlabelled leaves"):
        load_files(Files(dataset="stanfordnlp/snli"))
    with caplog.at_level("INFO", "rose_ds.data.labels"):
        data = load_files(Files(dataset="stanfordnlp/snli", drop_unlabelled=True))
    assert data.train is not None and data.validation is not None
    assert (data.train["text"], data.train["label"], data.validation["label"]) == (["t0", "t3"], [0, 1], [1])
    assert "stanfordnlp/snli[train]: 2 of 4 rows are dropped" in caplog.text
    assert "stanfordnlp/snli[validation]: 1 of 2 rows are dropped" in caplog.text


# --- rows set aside ---


def test_a_part_is_set_aside_by_the_text(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "".join(f"text {i % 300},{i % 3}\n" for i in range(600)))  # each text twice
    data = load_files(Files(train=path))
    assert data.train is not None
    assert data.validation is not None
    assert len(data.train) + len(data.validation) == 600
    assert 20 < len(data.validation) < 110
    assert not set(data.train["text"]) & set(data.validation["text"])
    chosen = {int(text.removeprefix("text ")) for text in data.validation["text"]}
    assert sorted(i for i in chosen if i < 60) == [21, 24, 25, 33, 47]  # whatever else the file has
    path.write_text(path.read_text() + "new,1\n")
    more = load_files(Files(train=path))
    assert more.validation is not None
    assert set(data.validation["text"]) <= set(more.validation["text"])
    only = load_files(Files(train=path), splits=("validation",))
    assert only.train is None
    assert perturb(data.validation, data.spec.fields, seed=0)["text"] != data.validation["text"]


def pairs(path: Path, questions: int, answers: int) -> Path:
    rows = (f"q{i},a{i} {j},{j % 2}\n" for i in range(questions) for j in range(answers))
    path.write_text("question1,question2,label\n" + "".join(rows))
    return path


def test_pairs_of_one_question_stay_together(tmp_path: Path) -> None:
    data = load_files(Files(train=pairs(tmp_path / "train.csv", 100, 10)))
    assert data.train is not None and data.validation is not None
    assert sorted(set(data.validation["text"])) == sorted(f"q{i}" for i in (9, 14, 24, 25, 41, 56, 64, 69, 84, 87, 95))
    assert (len(data.train), len(data.validation)) == (890, 110)


@pytest.mark.parametrize(("first", "last"), [(0, 3), (24, 26)])
def test_too_few_different_texts_to_set_some_aside(first: int, last: int, tmp_path: Path) -> None:
    """No question would be set aside, or each."""
    path = pairs(tmp_path / "a.csv", last, 10)
    header, *rows = path.read_text().splitlines(keepends=True)
    path.write_text(header + "".join(rows[first * 10 :]))
    told = (
        f"{path} has too few different texts in 'question1' ({last - first} in {len(rows) - first * 10} rows) to set "
        "some aside for validation: give --validation_file, or put the other text first (--text_columns question2 "
        "question1)"
    )
    with pytest.raises(DataError, match=re.escape(told)):
        load_files(Files(train=path))
    turned = load_files(Files(train=path, text_columns=("question2", "question1")))
    assert turned.train and turned.validation
    with pytest.raises(DataError, match=r"too few different texts in 'text' \(2 in 2 rows\) .*give --validation_file$"):
        load_files(Files(train=csv(tmp_path / "few.csv", "a", "b")))
