"""Adversarial files: AdvGLUE's and its kin's JSON, and rows of one's own, told apart by what is in them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rose_ds.data import DataError, load_task
from rose_ds.data.files import Files, load_files, with_adversarial

pytestmark = pytest.mark.fast


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def item(sentence: str, label: int, **more: Any) -> dict[str, Any]:
    return {"sentence": sentence, "label": label, **more}


def test_a_folder_of_adversarial_json(tmp_path: Path) -> None:
    """Several files, as AdvGLUE++ has one a model; items without idx, and one that two files share."""
    one = {"sst2": [item("bda film", 0, method="typo"), item("god film", 1)], "qqp": []}
    other = {"sst2": [item("god film", 1, idx=7), item("fine flm", 1)]}
    write(tmp_path / "alpaca.json", json.dumps(one))
    write(tmp_path / "vicuna.json", json.dumps(other))
    write(tmp_path / "about.json", json.dumps({"licence": "cc"}))
    data = load_files(
        Files(validation=write(tmp_path / "dev.tsv", "sentence\tlabel\na\t1\nb\t0\n"), adversarial=tmp_path), "SST-2"
    )
    assert data.adversarial is not None
    assert data.spec.name == "sst2"
    assert data.adversarial["sentence"] == ["bda film", "god film", "fine flm"]
    assert data.adversarial["label"] == [0, 1, 1]
    with pytest.raises(DataError, match="no JSON file here has items under the key 'rte'"):
        load_files(
            Files(validation=write(tmp_path / "dev.csv", "sentence1,sentence2,label\na,b,1\n"), adversarial=tmp_path),
            "rte",
        )


def test_an_adversarial_file_beside_glues_own_layout(tmp_path: Path) -> None:
    (tmp_path / "SST-2").mkdir()
    write(tmp_path / "SST-2" / "dev.tsv", "sentence\tlabel\na\t1\n")
    data = load_task("sst2", tmp_path, splits=("validation",))
    path = write(tmp_path / "mine.csv", "sentence,label\nbda,negative\n")
    assert with_adversarial(data, Files(adversarial=path)).adversarial["label"] == [0]  # type: ignore[index]
    path = write(tmp_path / "mine.json", json.dumps([item("bda", 0), item("god", 1)]))  # rows, and no AdvGLUE
    assert with_adversarial(data, Files(adversarial=path)).adversarial["label"] == [0, 1]  # type: ignore[index]


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        ('{"sentence": "bda", "label": 0}\n\n{"sentence": "god", "label": 1}\n', [0, 1]),
        ('{"sentence": "bda", "label": "negative"}\n', [0]),  # one row is one object too
        ('\ufeff{"sentence": "bda", "label": 0}\r\n{"sentence": "god", "label": 1}', [0, 1]),
        ('{"sentence": "café", "label": 1}\n{"sentence": "god", "label": 1}'.encode("latin-1"), [1, 1]),
        ('\n {\n "sst2": [\n{"sentence": "café", "label": 1}\n]\n}\n', [1]),
    ],
)
def test_an_adversarial_json_file_is_rows_or_advglue(content: str | bytes, labels: list[int], tmp_path: Path) -> None:
    """By what is in it, beside GLUE's own layout and beside files."""
    path = write(tmp_path / "hard.json", content)
    dev = write(tmp_path / "dev.csv", "sentence,label\na,1\nb,0\n")
    files = Files(validation=dev, adversarial=path, encoding="latin-1" if isinstance(content, bytes) else "utf-8")
    data = load_files(files, "sst2")
    for found in (data, with_adversarial(replace(data, adversarial=None), files)):
        assert found.adversarial is not None and found.adversarial["label"] == labels


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{\n"sst2": [\n{"sentence": "a", "label": 1},\n]\n}', r"hard\.json is not JSON: .* line [45] column"),
        ('{"qqp": []}', r"hard\.json: expected a list of items under the key 'sst2', found: 'qqp'"),
        ('{"sentence": "a", "label": 0}\n{"sentence": "b"\n', r"hard\.json:2: not JSON"),
        ("[" * 10**5, r"hard\.json:1: not JSON: maximum recursion depth"),
    ],
)
def test_a_damaged_adversarial_json_file(content: str, message: str, tmp_path: Path) -> None:
    dev = write(tmp_path / "dev.csv", "sentence,label\na,1\nb,0\n")
    with pytest.raises(DataError, match=message):
        load_files(Files(validation=dev, adversarial=write(tmp_path / "hard.json", content)), "sst2")
    with pytest.raises(DataError, match=r"cannot read .*none\.json: No such file"):
        load_files(Files(validation=dev, adversarial=tmp_path / "none.json"), "sst2")
