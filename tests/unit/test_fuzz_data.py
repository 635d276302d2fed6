"""Damaged data files: a DataError that names the place, or every row as it was written. Never fewer rows."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from fuzzing import FUZZ, JSON
from hypothesis import given
from hypothesis import strategies as st

from rose_ds.data import TASKS, DataError, TaskSpec, load_task, perturb
from rose_ds.data.perturb import FAMILIES
from rose_ds.data.snippets import ARCHIVE

pytestmark = pytest.mark.fast

GLUE = [spec for spec in TASKS.values() if spec.folder]

#: What a cell of a TSV file can hold: anything but its separators, a NUL, and a blank text.
TEXTS = st.text(
    alphabet=st.characters(exclude_characters="\t\n\r\0", exclude_categories=["Cs"]), min_size=1, max_size=12
)
TEXTS = TEXTS.filter(lambda text: bool(text.strip()))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder that every example writes anew."""
    folder = tmp_path_factory.mktemp("glue")
    for spec in GLUE:
        (folder / str(spec.folder)).mkdir()
    (folder / "AdvGLUE").mkdir()
    return folder


def load(root: Path, spec: TaskSpec, split: str = "validation") -> Dataset:
    return getattr(load_task(spec.name, root, splits=(split,)), split)


#: What becomes of a row's cells: (cells, column of a text, column of the label) -> line.
DAMAGES: dict[str, Callable[[list[bytes], int, int], bytes]] = {
    "none": lambda cells, text, label: b"\t".join(cells),
    "cell missing": lambda cells, text, label: b"\t".join(cells[1:]),
    "cell too many": lambda cells, text, label: b"\t".join([*cells, b"1"]),
    "label": lambda cells, text, label: b"\t".join([*cells[:label], cells[label] + b"x", *cells[label + 1 :]]),
    "blank": lambda cells, text, label: b"\t".join([*cells[:text], b" ", *cells[text + 1 :]]),
    "nul": lambda cells, text, label: b"\t".join([*cells[:text], cells[text] + b"\0", *cells[text + 1 :]]),
    "utf8": lambda cells, text, label: b"\t".join([*cells[:text], b"\xff", *cells[text + 1 :]]),
    "empty": lambda cells, text, label: b"",
}


@FUZZ
@given(st.data())
def test_a_tsv_file_is_read_whole_or_each_bad_line_is_named(root: Path, data: st.DataObject) -> None:
    spec = data.draw(st.sampled_from(GLUE))
    order = data.draw(st.permutations([*spec.fields, "index", "note", spec.tsv_label]))
    text, label = order.index(spec.fields[0]), order.index(spec.tsv_label)
    rows, lines, bad = [], [], []
    for number in range(2, 2 + data.draw(st.integers(1, 5))):
        row = {name: data.draw(TEXTS) for name in order}
        row[spec.tsv_label] = data.draw(st.sampled_from(spec.tsv_values))
        damage = data.draw(st.just("none") | st.sampled_from(list(DAMAGES)))
        lines.append(DAMAGES[damage]([row[name].encode() for name in order], text, label))
        rows.append(row)
        if damage != "none":
            bad.append(number)
    end = data.draw(st.sampled_from([b"\n", b"\r\n"]))
    last = data.draw(st.sampled_from([b"", end])) if lines[-1] else end  # an empty line is one if it ends
    path = root / str(spec.folder) / "dev.tsv"
    path.write_bytes(end.join(["\t".join(order).encode(), *lines]) + last)
    if bad:
        with pytest.raises(DataError) as refused:
            load(root, spec)
        assert all(f"{path}:{number}: " in str(refused.value) for number in bad)
        assert f"{len(bad)} bad row(s) in all" in str(refused.value)
        return
    found = load(root, spec).to_list()
    assert [[row[name] for name in spec.fields] for row in found] == [[row[f] for f in spec.fields] for row in rows]
    assert [spec.tsv_values[row["label"]] for row in found] == [row[spec.tsv_label] for row in rows]


TSV = b"sentence\tlabel\na fine film\t1\na dull , long film\t0\nnot bad\t1\n\xc3\xa9l\xc3\xa9gant\t1\n"
ITEMS = [{"idx": i, "sentence": f"film {i} is \u00e9l\u00e9gant", "label": i % 2} for i in range(3)]
ADVGLUE = json.dumps({"sst2": ITEMS, "qqp": []}, ensure_ascii=False).encode()
EDITS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 2), st.binary(min_size=1, max_size=3)), max_size=3)


def edited(content: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """``content`` with some bytes replaced, inserted or cut off."""
    for position, kind, new in edits:
        at = position % (len(content) + 1)
        content = (content[:at] + new + content[at + len(new) :], content[:at] + new + content[at:], content[:at])[kind]
    return content


@FUZZ
@given(EDITS, st.sampled_from([b"", b"\xef\xbb\xbf"]))
def test_random_bytes_in_a_tsv_file(root: Path, edits: list[tuple[int, int, bytes]], mark: bytes) -> None:
    content = edited(mark + TSV, edits)
    path = root / "SST-2" / "dev.tsv"
    path.write_bytes(content)
    try:
        dataset = load(root, TASKS["sst2"])
    except DataError as error:
        assert str(path) in str(error)
        return
    assert len(dataset) == content.removesuffix(b"\n").count(b"\n")
    assert set(dataset["label"]) <= {0, 1}
    assert all(text.strip() and text.encode() in content for text in dataset["sentence"])


@FUZZ
@given(EDITS, st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_random_bytes_in_advglue(root: Path, edits: list[tuple[int, int, bytes]], encoding: str) -> None:
    content = edited(ADVGLUE.decode().encode(encoding), edits)
    path = root / "AdvGLUE" / "dev.json"
    path.write_bytes(content)
    try:
        dataset = load(root, TASKS["sst2"], "adversarial")
    except DataError as error:
        assert str(path) in str(error)
        return
    assert dataset.to_list() == json.loads(content)["sst2"]
    assert set(dataset["label"]) <= {0, 1}


@FUZZ
@given(st.sampled_from(["idx", "sentence", "label", None]), JSON | st.just("\ud800"), st.integers(0, 2))
def test_advglue_items_of_anything(root: Path, name: str | None, value: Any, number: int) -> None:
    """One value of one item, or the whole item, is anything at all."""
    items: list[Any] = [dict(item) for item in ITEMS]
    if name is None:
        items[number] = value
    else:
        items[number][name] = value
    path = root / "AdvGLUE" / "dev.json"
    path.write_text(json.dumps({"sst2": items}))
    fits = {
        "idx": type(value) is int and -(2**31) <= value < 2**31,
        "label": type(value) is int and value in (0, 1),
        "sentence": isinstance(value, str) and bool(value.strip()) and not re.search("[\0\ud800]", value),
        None: False,
    }[name]
    if fits:
        assert load(root, TASKS["sst2"], "adversarial").to_list() == items
    else:
        with pytest.raises(DataError, match=rf"dev\.json: sst2\[{number}\]: "):
            load(root, TASKS["sst2"], "adversarial")


FOUND: list[tuple[str, Any, str]] = [
    ("SST-2/dev.tsv", "sentence\tlabel\nfine \0\0\0\t1\n", "dev.tsv:2: 'sentence' has a NUL"),
    ("SST-2/dev.tsv", "label\tsentence\tlabel\n0\tfine\t1\n", "dev.tsv:1: a column occurs twice: 'label', 'sentence'"),
    ("SST-2/dev.tsv", "\ufeff\ufeffsentence\tlabel\nfine\t1\n", r"found: '\ufeffsentence', 'label'"),
    ("SST-2/dev.tsv", f"sentence\tlabel\nfine\t{'1' * 10**6}\n", "expected the label '0' or '1', found '111"),
    ("SST-2/dev.tsv", "x" * 10**6, "no column 'sentence', 'label'"),
    ("AdvGLUE/dev.json", "[" * 10**5, "dev.json is not JSON: maximum recursion depth"),
    (
        "AdvGLUE/dev.json",
        {"sst2": [{**ITEMS[0], "idx": 2**31}]},
        "sst2[0]: 'idx' must fit in 32 bits, found 2147483648",
    ),
    ("AdvGLUE/dev.json", {"sst2": [{**ITEMS[0], "sentence": "\ud800"}]}, "half a surrogate pair"),
    ("AdvGLUE/dev.json", {"x" * 10**6: []}, "expected a list of items under the key 'sst2'"),
]


@pytest.mark.parametrize(("file", "content", "words"), FOUND, ids=range(len(FOUND)))
def test_damage_that_once_slipped_through(root: Path, file: str, content: Any, words: str) -> None:
    """Refused, in a message that a terminal can show."""
    (root / file).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(words)) as refused:
        load(root, TASKS["sst2"], "validation" if file.endswith("tsv") else "adversarial")
    assert len(str(refused.value)) < 2000


def test_a_very_long_line_is_a_row(root: Path) -> None:
    long = "fine " * 10**6
    (root / "SST-2" / "dev.tsv").write_text(f"sentence\tlabel\n{long}\t1\ngood\t0\n")
    assert load(root, TASKS["sst2"])["sentence"] == [long, "good"]


@pytest.mark.parametrize("task", ["sst2", "snippets"])
@pytest.mark.parametrize("folder", ["x" * 5000, "nul\0", "", "file"])
def test_a_folder_that_cannot_be_one(task: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"is not a folder|does not exist|cannot read"):
        load_task(task, f"{tmp_path}/{folder}", splits=("validation",))


@FUZZ
@given(st.binary(max_size=200))
def test_an_archive_of_anything_is_refused(root: Path, content: bytes) -> None:
    (root / ARCHIVE).write_bytes(content)
    with pytest.raises(DataError, match="is not .* as published: expected SHA-256") as refused:
        load_task("snippets", root, splits=("validation",))
    assert str(root / ARCHIVE) in str(refused.value)


# --- perturbations ---

FEATURES = Features(
    {"first": Value("string"), "second": Value("string"), "label": ClassLabel(names=["a", "b"]), "idx": Value("int32")}
)


@FUZZ
@given(st.lists(st.tuples(st.text(max_size=40), st.text(max_size=20)), min_size=1, max_size=8), st.integers())
def test_perturb_any_text(pairs: list[tuple[str, str]], seed: int) -> None:
    """The same for the same seed, at most one text of a row changed, labels as they were."""
    count = len(pairs)
    columns = {
        "first": [a for a, _ in pairs],
        "second": [b for _, b in pairs],
        "label": [i % 2 for i in range(count)],
        "idx": list(range(count)),
    }
    dataset = Dataset.from_dict(columns, features=FEATURES)
    once = perturb(dataset, ("first", "second"), seed=seed)
    assert once.to_dict() == perturb(dataset, ("first", "second"), seed=seed).to_dict()
    assert once.features == dataset.features
    assert dataset.to_dict() == columns  # the original is left alone
    for name in ("label", "idx"):
        assert once[name] == columns[name]
    for row, (first, second) in zip(once, pairs, strict=True):
        assert row["first"] == first or row["second"] == second


@FUZZ
@given(st.sampled_from(list(FAMILIES)), st.text(max_size=60), st.integers())
def test_a_family_keeps_most_of_any_text(family: str, text: str, seed: int) -> None:
    new = FAMILIES[family](text, random.Random(seed))
    assert new == FAMILIES[family](text, random.Random(seed))
    if family in ("token", "distractor"):
        assert len(new) > len(text)
    else:
        assert len(text) - 3 <= len(new) <= len(text)
        assert sum(a != b for a, b in zip(text.split(), new.split(), strict=True)) <= 3
    new.encode()
