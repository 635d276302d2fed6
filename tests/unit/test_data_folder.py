"""GLUE's TSV layout: what is read, and what is refused with which file and line."""

import json
import os
import re
from pathlib import Path

import pytest
from datasets import ClassLabel, Value

from rose_ds.data import DataError, load_task

pytestmark = pytest.mark.fast

HEADERS = {
    "SST-2": "sentence\tlabel",
    "RTE": "index\tsentence1\tsentence2\tlabel",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
}


def write(root: Path, folder: str, *lines: str | bytes, name: str = "dev.tsv") -> Path:
    """A TSV file of the given rows under the folder's header; returns its path."""
    path = root / folder / name
    path.parent.mkdir(exist_ok=True)
    rows = [line if isinstance(line, bytes) else line.encode() for line in (HEADERS[folder], *lines)]
    path.write_bytes(b"\n".join(rows) + b"\n")
    return path


def validation(root: Path, task: str):
    return load_task(task, root, splits=("validation",)).validation


@pytest.mark.parametrize(
    ("folder", "rows", "fields", "labels"),
    [
        ("SST-2", ["good \t1", "bad \t0"], ["sentence"], [1, 0]),
        ("RTE", ["7\ta b\tc\tentailment", "9\td\te\tnot_entailment"], ["sentence1", "sentence2"], [0, 1]),
        ("QNLI", ["7\ta b\tc\tentailment", "9\td\te\tnot_entailment"], ["question", "sentence"], [0, 1]),
        ("QQP", ["7\t1\t2\ta?\tb?\t1", "8\t3\t4\tc?\td?\t0"], ["question1", "question2"], [1, 0]),
    ],
)
def test_rows_columns_and_label_ids(tmp_path, folder, rows, fields, labels):
    write(tmp_path, folder, *rows)
    dataset = validation(tmp_path, folder)
    assert dataset.column_names == [*fields, "label", "idx"]
    assert dataset["label"] == labels
    assert dataset["idx"] == [0, 1]  # the hub's idx is the row's position, not the file's own number
    assert isinstance(dataset.features["label"], ClassLabel)
    assert dataset.features["idx"] == Value("int32")
    first = rows[0].split("\t")
    assert [dataset[0][field] for field in fields] == first[-1 - len(fields) : -1]


def test_quotes_and_odd_line_separators_are_text(tmp_path):
    texts = ['"an opening quote', 'half " way', '"quoted"', "a\u2028line\x85separator\x0cor two", "na\u00efve"]
    write(tmp_path, "SST-2", *(f"{text}\t1" for text in texts))
    assert validation(tmp_path, "sst2")["sentence"] == texts


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    path = write(tmp_path, "SST-2", "good\t1", "bad\t0")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert validation(tmp_path, "sst2")["sentence"] == ["good", "bad"]


def test_windows_line_ends(tmp_path):
    path = write(tmp_path, "SST-2", "good\t1", "bad\t0")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert validation(tmp_path, "sst2")["label"] == [1, 0]


@pytest.mark.parametrize(
    ("folder", "line", "problem"),
    [
        ("SST-2", "one tab\ttoo many\t1", "expected 2 columns (1 tabs), found 3"),
        ("SST-2", "no tab", "expected 2 columns (1 tabs), found 1"),
        ("SST-2", "", "expected 2 columns (1 tabs), found 1"),
        ("SST-2", "good\t2", "expected the label '0' or '1', found '2'"),
        ("SST-2", "good\tpositive", "expected the label '0' or '1', found 'positive'"),
        ("SST-2", "good\t", "expected the label '0' or '1', found ''"),
        ("SST-2", "  \t1", "expected a text in 'sentence', found '  '"),
        ("SST-2", b"caf\xe9\t1", "'utf-8' codec can't decode byte 0xe9 in position 3"),
        ("RTE", "5\ta\tb\t1", "expected the label 'entailment' or 'not_entailment', found '1'"),
        ("QNLI", "5\ta\t\tentailment", "expected a text in 'sentence', found ''"),
        ("QQP", "5\t1\t2\tHow?\t\t0", "expected a text in 'question2', found ''"),
        ("QQP", "5\t1\t2\tHow?", "expected 6 columns (5 tabs), found 4"),
    ],
)
def test_a_corrupt_row_is_named(tmp_path, folder, line, problem):
    good = {"SST-2": "a\t1", "RTE": "1\ta\tb\tentailment", "QNLI": "1\ta\tb\tentailment", "QQP": "1\t1\t2\ta\tb\t1"}
    path = write(tmp_path, folder, good[folder], line, good[folder])
    with pytest.raises(DataError, match=re.escape(f"{path}:3: {problem}")) as error:
        validation(tmp_path, folder)
    assert f"sed -i '3d' '{path}'" in str(error.value)


def test_all_corrupt_rows_are_counted_and_the_offered_command_mends_the_file(tmp_path):
    path = write(tmp_path, "SST-2", "\t0", "good\t1", "bad", "bad\t0", "x\ty")
    with pytest.raises(DataError, match=r"3 bad row\(s\) in all") as error:
        validation(tmp_path, "sst2")
    assert [f"{path}:{line}:" in str(error.value) for line in (2, 3, 4, 5, 6)] == [True, False, True, False, True]
    command = re.search(r"sed -i .*", str(error.value))
    assert os.system(command.group()) == 0
    assert validation(tmp_path, "sst2")["sentence"] == ["good", "bad"]


def test_a_wrong_file_does_not_list_a_thousand_lines(tmp_path):
    write(tmp_path, "SST-2", *["a\tb"] * 1000)
    with pytest.raises(DataError, match="1000 such rows in all: is this the right file") as error:
        validation(tmp_path, "sst2")
    assert len(str(error.value).splitlines()) == 6


def test_missing_column_names_those_found(tmp_path):
    path = write(tmp_path, "QQP", "1\t1\t2\ta\tb\t1")
    path.write_text(path.read_text().replace("is_duplicate", "label"))
    problem = f"{path}:1: no column 'is_duplicate'; qqp needs the tab-separated columns question1, question2, "
    with pytest.raises(DataError, match=re.escape(problem)) as error:
        validation(tmp_path, "qqp")
    assert "'qid2', 'question1', 'question2', 'label'" in str(error.value)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(
        DataError, match=r"nowhere is not a folder; --data wants a folder with SST-2/\{train,dev\}\.tsv"
    ):
        validation(tmp_path / "nowhere", "sst2")
    with pytest.raises(DataError, match=re.escape(f"cannot read {tmp_path / 'SST-2' / 'dev.tsv'} (No such file")):
        validation(tmp_path, "sst2")
    path = write(tmp_path, "SST-2")
    with pytest.raises(DataError, match=re.escape(f"{path} has a header but no rows")):
        validation(tmp_path, "sst2")
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r":1: no column 'sentence', 'label'"):
        validation(tmp_path, "sst2")


def test_only_the_splits_asked_for_are_read(tmp_path):
    write(tmp_path, "SST-2", "good\t1")
    write(tmp_path, "SST-2", "corrupt", name="train.tsv")
    data = load_task("sst2", tmp_path, splits=("validation", "adversarial"))
    assert data.train is None
    assert data.adversarial is None  # the folder has no AdvGLUE
    assert len(data.validation) == 1
    with pytest.raises(DataError, match=r"train\.tsv:2:"):
        load_task("sst2", tmp_path)


def write_advglue(root: Path, content: object) -> Path:
    path = root / "AdvGLUE" / "dev.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_advglue_items(tmp_path):
    items = [
        {"idx": 4, "question1": "a?", "question2": 'b "c"?', "label": 1, "method": "TextBugger"},
        {"idx": 2, "label": 0, "question2": "e?", "question1": "d?"},
    ]
    write_advglue(tmp_path, {"sst2": [], "qqp": items})
    dataset = load_task("qqp", tmp_path, splits=("adversarial",)).adversarial
    assert dataset.to_list() == [
        {"question1": "a?", "question2": 'b "c"?', "label": 1, "idx": 4},
        {"question1": "d?", "question2": "e?", "label": 0, "idx": 2},
    ]
    assert dataset.features["label"].names == ["not_duplicate", "duplicate"]


GOOD_ITEM = {"idx": 0, "sentence": "good", "label": 1}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", " is not JSON"),
        ([GOOD_ITEM], ": expected a list of items under the key 'sst2', found: list"),
        ({"qqp": [], "rte": []}, ": expected a list of items under the key 'sst2', found: 'qqp', 'rte'"),
        ({"sst2": [GOOD_ITEM, "bad"]}, ": sst2[1]: no field 'sentence', 'label', 'idx'"),
        ({"sst2": [GOOD_ITEM, {"idx": 1, "label": 1}]}, ": sst2[1]: no field 'sentence'"),
        ({"sst2": [GOOD_ITEM | {"label": 2}]}, ": sst2[0]: expected the label 0 or 1, found 2"),
        ({"sst2": [GOOD_ITEM | {"label": True}]}, ": sst2[0]: expected the label 0 or 1, found True"),
        ({"sst2": [GOOD_ITEM | {"label": "1"}]}, ": sst2[0]: expected the label 0 or 1, found '1'"),
        ({"sst2": [GOOD_ITEM | {"sentence": ""}]}, ": sst2[0]: expected a text in 'sentence', found ''"),
        ({"sst2": [GOOD_ITEM | {"sentence": 5}]}, ": sst2[0]: expected a text in 'sentence', found 5"),
        ({"sst2": [GOOD_ITEM | {"idx": "0"}]}, ": sst2[0]: expected an integer in 'idx', found '0'"),
    ],
)
def test_corrupt_advglue_is_named(tmp_path, content, problem):
    path = write_advglue(tmp_path, content)
    with pytest.raises(DataError, match=re.escape(f"{path}{problem}")):
        load_task("sst2", tmp_path, splits=("adversarial",))


@pytest.mark.parametrize(
    ("task", "counts"),
    [
        ("SST-2", (60614, 872, 148)),
        ("RTE", (2490, 277, 81)),
        ("QNLI", (8999, 5463, 148)),
        ("QQP", (19708, 2000, 78)),
    ],
)
def test_real_glue_loads_whole(task, counts):
    root = Path(os.environ.get("ROSE_DS_TEST_DATA") or Path(__file__).resolve().parents[3].joinpath("shared", "data"))
    if not (root / task).is_dir():
        pytest.skip(f"no GLUE folder at {root}: set ROSE_DS_TEST_DATA to one")
    data = load_task(task, root)
    assert (len(data.train), len(data.validation), len(data.adversarial)) == counts
    assert data.train.features == data.validation.features == data.adversarial.features
    for dataset in (data.train, data.validation, data.adversarial):
        assert set(dataset["label"]) == {0, 1}
