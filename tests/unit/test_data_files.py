"""Files of one's own: the right reading of odd ones, and one clear line with file and row for the others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from pyarrow import parquet
from torch.nn import functional as F

from rose_ds.data import DataError
from rose_ds.data.files import Files, load_files
from rose_ds.data.tables import read_rows
from rose_ds.experiments.loading import load_data, settings_of
from rose_ds.experiments.losses import weighted_loss, weights_of
from rose_ds.experiments.metrics import Metrics
from rose_ds.experiments.settings import RunSettings

pytestmark = pytest.mark.fast

CSV = "text,label\ngood film,pos\nbad film,neg\n"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, **options: Any) -> tuple[list[Any], list[int], tuple[str, ...]]:
    """Texts, label ids and label names of a file, with nothing set aside."""
    data = load_files(Files(validation=path, **options))
    rows = data.validation
    assert rows is not None
    texts = [tuple(row[f] for f in data.spec.fields) for row in rows]
    return [t[0] if len(t) == 1 else t for t in texts], list(rows["label"]), data.spec.labels


SAME = (["good film", "bad film"], [1, 0], ("neg", "pos"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", CSV),
        ("a.CSV", CSV),
        ("bom.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("utf16.csv", CSV.encode("utf-16")),
        ("crlf.csv", CSV.replace("\n", "\r\n")),
        ("no-end.csv", CSV.rstrip("\n")),
        ("empty-rows.csv", CSV.replace("\nbad", "\n\n  \n,\nbad")),
        ("quoted.csv", 'text,label\n"good film",pos\n"bad film","neg"\n'),
        ("spaces.csv", "text , label\ngood film, pos\nbad film,neg \n"),
        ("more.csv", "id,label,text,id\n1,pos,good film,1\n2,neg,bad film,2\n"),
        ("a.tsv", CSV.replace(",", "\t")),
        ("semicolons.csv", CSV.replace(",", ";")),
        ("semicolons-bom.csv", b"\xef\xbb\xbf" + CSV.replace(",", ";").replace("\n", "\r\n").encode()),
        ("semicolons-quoted.csv", '"text";"label";"a, b"\n"good film";"pos";"1,5"\nbad film;neg;1,5\n'),
        ("semicolon-in-a-name.csv", '"a;b",text,label\n1,good film,pos\n2,bad film,neg\n'),
        ("sep.csv", "sep=;\r\n" + CSV.replace(",", ";").replace("\n", "\r\n")),
        ("sep-bom.csv", b"\xef\xbb\xbfsep=|\n" + CSV.replace(",", "|").encode()),
        ("sep-tab.csv", "sep=\t\n" + CSV.replace(",", "\t")),
        ("sep-comma.csv", 'sep=,\ntext,label,"c;d"\ngood film,pos,1\nbad film,neg,1\n'),
        ("semicolon-in-the-only-line.csv", '"label","a;\nb","text"\npos,1,good film\nneg,2,bad film\n'),
        ("a.jsonl", '{"text": "good film", "label": "pos"}\n\n{"label": "neg", "text": "bad film"}\n'),
        ("a.json", '[{"text": "good film", "label": "pos"}, {"text": "bad film", "label": "neg"}]'),
        ("some.jsonl", '{"text": "good film", "label": "pos", "by": 1}\n{"text": "bad film", "label": "neg"}\n'),
        ("later.jsonl", '{"text": "good film", "label": "pos"}\n{"text": "bad film", "label": "neg", "by": 1}\n'),
    ],
)
def test_one_reading(name: str, content: str | bytes, tmp_path: Path) -> None:
    assert read(write(tmp_path / name, content)) == SAME


def test_texts_are_kept_as_they_are(tmp_path: Path) -> None:
    """What a reader of tables would turn into nothing, cut, or unquote."""
    texts = ["NA", "null", "None", 'say "no", twice', "two\nlines", "semi;colon", " padded ", "\u2028 separator", "007"]
    rows = "".join('"' + text.replace('"', '""') + f'",{i % 2}\n' for i, text in enumerate(texts))
    assert read(write(tmp_path / "a.csv", "text,label\n" + rows))[0] == texts
    plain = ['"an opening quote', 'half " way', "a,b", "\u2028 separator\x85"]
    rows = "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(plain))
    assert read(write(tmp_path / "a.tsv", "text\tlabel\n" + rows))[0] == plain


def test_latin_1_is_said_and_then_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\nfine,1\ncafé,0\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.csv:3: byte 0xe9 is not utf-8: .*--file_encoding"):
        read(path)
    assert read(path, encoding="latin-1")[0] == ["fine", "café"]
    with pytest.raises(DataError, match="file_encoding='klingon' is no encoding"):
        read(path, encoding="klingon")


def test_a_byte_order_mark_that_the_content_contradicts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An editor's mark on top of another program's rows: what the user says is tried, and told."""
    mark, rows = b"\xef\xbb\xbf", "text,label\nschön,1\nsüß,0\n".encode("cp1252")
    path = write(tmp_path / "a.csv", mark + rows)
    with pytest.raises(
        DataError, match=r"a\.csv:2: byte 0xf6 is not utf-8: .* \(its byte-order mark says utf-8, which"
    ):
        read(path)
    assert read(path, encoding="cp1252")[0] == ["schön", "süß"]
    assert "a.csv: its byte-order mark says utf-8, which its content contradicts: read as cp1252" in caplog.text
    with pytest.raises(DataError, match=r"a\.csv:3: byte 0x81 is not cp1252: "):
        read(write(path, mark + rows.replace(b"\xfc", b"\x81")), encoding="cp1252")
    caplog.clear()
    assert read(write(path, mark + "text,label\nschön,1\nb,0\n".encode()), encoding="cp1252")[0] == ["schön", "b"]
    assert not caplog.records
    wide = "text,label\n\u0a0a,1\nb,0\n".encode("utf-16")  # three lines, with five bytes 0x0a
    with pytest.raises(DataError, match=r"a\.csv:4: byte 0x78 is not utf-16-le: .*mark says utf-16-le"):
        read(write(path, wide + b"x"))


def test_parquet_with_and_without_names(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": SAME[0], "label": ["pos", "neg"]}), tmp_path / "plain.parquet")
    assert read(tmp_path / "plain.parquet") == SAME
    features = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "neg"])})
    Dataset.from_dict({"text": SAME[0], "label": [0, 1]}, features=features).to_parquet(tmp_path / "named.parquet")
    assert read(tmp_path / "named.parquet") == (SAME[0], [0, 1], ("pos", "neg"))  # the file's own order
    with pytest.raises(DataError, match="is not Parquet"):
        read(write(tmp_path / "damaged.parquet", b"PAR1 and no more"))


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own label names; a validation split where it has none; what cannot be reached is said in one line."""
    features = Features({"text": Value("string"), "kind": ClassLabel(names=["spam", "ham"])})
    rows = Dataset.from_dict({"text": [f"t{i}" for i in range(40)], "kind": [0, 1] * 20}, features=features)
    asked = []

    def load_dataset(name: str, config: str | None) -> dict[str, Dataset]:
        asked.append((name, config))
        if name == "nowhere":
            raise ConnectionError("offline")
        return {"train": rows, "test": rows} if config is None else {"train": rows, "validation": rows.select([3])}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_files(Files(dataset="me/mails", label_column="kind"))
    assert (data.spec.name, data.spec.labels) == ("mails", ("spam", "ham"))
    assert data.train is not None
    assert data.validation is not None
    assert len(data.train) + len(data.validation) == 40
    data = load_files(Files(dataset="me/mails:raw", label_column="kind"))
    assert data.validation is not None
    assert data.validation["label"] == [1]
    assert asked == [("me/mails", None), ("me/mails", "raw")]
    with pytest.raises(DataError, match="cannot load the data set 'nowhere': ConnectionError: offline"):
        load_files(Files(dataset="nowhere"))
    with pytest.raises(DataError, match="brings its own rows"):
        load_files(Files(dataset="me/mails", train=Path("a.csv")))
    with pytest.raises(DataError, match=r"me/mails\[train\]: row 1: column 'label' is not there; found: 'text'"):
        load_files(Files(dataset="me/mails"))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["1", "0", "10", "2"], ("0", "1", "2", "10")),
        (["1.0", "0.0", "1", "-1"], ("-1", "0", "1")),
        (["b", "a", "c", "a"], ("a", "b", "c")),
        (["yes", "1", "0.5", "no"], ("0.5", "1", "no", "yes")),
        (["1_1", "11", "1_2", "100"], ("100", "11", "1_1", "1_2")),
        (["+1", "01", "-1", "0.0", "-0"], ("-1", "0", "1")),
        (["10", "1e1", "1f1"], ("10", "1e1", "1f1")),
        (["12345678901234567", "12345678901234568"], ("12345678901234567", "12345678901234568")),
    ],
)
def test_label_names(values: list[str], names: tuple[str, ...], tmp_path: Path) -> None:
    rows = "".join(f"t{i},{value}\n" for i, value in enumerate(values))
    assert read(write(tmp_path / "a.csv", "text,label\n" + rows))[2] == names
    lines = "".join(json.dumps({"text": f"t{i}", "label": v}) + "\n" for i, v in enumerate(values))
    assert read(write(tmp_path / "a.jsonl", lines))[2] == names


def test_numbers_and_truths_in_json(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": "t", "label": v}) + "\n" for v in (True, False, True))
    assert read(write(tmp_path / "a.jsonl", lines))[1:] == ([1, 0, 1], ("false", "true"))
    lines = "".join(json.dumps({"text": "t", "label": v}) + "\n" for v in (3, 1.0, 2))
    assert read(write(tmp_path / "a.jsonl", lines))[1:] == ([2, 0, 1], ("1", "2", "3"))


def test_pairs_by_name_and_by_flag(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "premise,hypothesis,label,idx\na,b,0,5\nc,d,1,6\n")
    assert read(path) == ([("a", "b"), ("c", "d")], [0, 1], ("0", "1"))
    assert read(path, text_columns=("idx",)) == (["5", "6"], [0, 1], ("0", "1"))
    assert read(path, text_columns=("hypothesis",), label_column="premise")[2] == ("a", "c")


@pytest.mark.parametrize(
    ("header", "texts"),
    [
        ("question,sentence,label", ("question", "sentence")),  # QNLI's
        ("sentence1,sentence2,text,label", ("sentence1", "sentence2")),
        ("sentence,label", ("sentence",)),
        ("question,text,label", ("text",)),
    ],
)
def test_usual_names_are_whole_pairs_first(
    header: str, texts: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And it is said, once, which columns they are."""
    names = header.split(",")
    rows = "".join(",".join([*(f"{name} {i}" for name in names[:-1]), str(i)]) + "\n" for i in range(2))
    path = write(tmp_path / "a.csv", f"{header}\n{rows}")
    with caplog.at_level("INFO", "rose_ds.data.files"):
        data = load_files(Files(validation=path, adversarial=path))
    assert data.validation is not None
    assert tuple(data.validation[0][field] for field in data.spec.fields) == tuple(f"{name} 0" for name in texts)
    assert [r.getMessage() for r in caplog.records] == [
        f"{path}: the texts are {' and '.join(map(repr, texts))}; others with --text_columns"
    ]
    caplog.clear()
    with caplog.at_level("INFO", "rose_ds.data.files"):
        read(path, text_columns=texts)
    assert not caplog.records


def test_delimiters_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        read_rows(write(tmp_path / "a.csv", CSV))
        assert not caplog.records
        read_rows(write(tmp_path / "b.csv", CSV.replace(",", ";")))
        read_rows(write(tmp_path / "c.csv", "sep=|\n" + CSV.replace(",", "|")))
    assert "b.csv: the header has semicolons and no comma: columns are separated by ';'" in caplog.text
    assert "c.csv: columns are separated by '|', as its first line says" in caplog.text


BAD: list[tuple[str, str, dict[str, Any], str]] = [
    ("a.csv", "", {}, r"a\.csv is empty"),
    ("a.csv", "text,label\n", {}, r"a\.csv has no rows"),
    ("a.csv", "text,text,label\na,b,1\nc,d,0\n", {}, r"a\.csv:1: column 'text' occurs twice"),
    ("a.csv", "text,label,label\na,b,1\n", {}, r"a\.csv:1: column 'label' occurs twice"),
    ("a.csv", "text,target\na,1\n", {}, r"a\.csv:1: column 'label' is not there; found: 'text', 'target'"),
    ("a.csv", "body,label\na,1\n", {}, r"which columns are the texts\? .*found: 'body', 'label'"),
    ("a.csv", "text,label\na,1\nb,0,2\n", {}, r"a\.csv:3: 3 columns, but the header has 2"),
    ("a.csv", "text,label\na,1\nb\n", {}, r"a\.csv:3: 1 columns, but the header has 2"),
    ("a.csv", 'text,label\na,1\n"b,0\nc,1\n', {}, r"a\.csv:3: .*is a quote left open"),
    ("a.csv", "text,label\na,1\nb,\n", {}, r"a\.csv:3: no label in 'label'"),
    ("a.csv", "text,label\na,1\n ,0\n", {}, r"a\.csv:3: expected a text in 'text', found ' '"),
    ("a.csv", "text,label\na,1\nb\0,0\n", {}, r"a\.csv:3: 'text' has a NUL"),
    ("a.csv", 'text,label\n"a\nb",1\n"",0\n', {}, r"a\.csv:4: expected a text"),  # rows of several lines
    ("a.csv", "text,label\na,1\nb,1\n", {}, r"'label' is '1' in every row"),
    ("a.csv", "text,label\na,1\nb,0.37\n", {}, r"a\.csv:3: .*numbers such as 0\.37: regression is not supported, for"),
    ("a.csv", "text,label\n" + "".join(f"a,{i}\n" for i in range(60)), {}, "60 different values in 60 rows"),
    ("a.csv", "text,label\na,1\n", {"text_columns": ("text", "b", "c")}, "expected one column or two"),
    ("a.csv", "text,label\na,1\n", {"text_columns": ("label",)}, "not the label column"),
    ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"\n', {}, r"a\.jsonl:2: not JSON"),
    ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', {}, r"a\.jsonl:2: no label in 'label'"),
    ("a.jsonl", '{"label": 1}\n{"text": "b", "label": 0}\n', {}, r"a\.jsonl:1: expected a text in 'text', found None"),
    ("a.csv", "text;label\na;b;1\n", {}, r"a\.csv:2: 3 columns, but the header has 2 \(separated by ';'\)"),
    ("a.csv", "sep=;\ntext;label\na,b;1\nc\n", {}, r"a\.csv:4: 1 columns, but the header has 2 \(separated by ';'\)"),
    ("a.csv", "sep=;", {}, r"a\.csv has no rows"),
    ("a.jsonl", '{"text": "a", "label": 1}\n["b", 0]\n', {}, r"a\.jsonl:2: expected an object"),
    ("a.jsonl", '{"text": "a", "text": "b", "label": 1}\n', {}, r"a\.jsonl:1: .*a field occurs twice"),
    (
        "a.jsonl",
        '{"text": 5, "label": 1}\n{"text": "b", "label": 0}\n',
        {},
        r"a\.jsonl:1: expected a text in 'text', found 5",
    ),
    ("a.jsonl", '{"text": "a", "label": [1]}\n', {}, r"a\.jsonl:1: expected one label"),
    ("a.jsonl", '{"text": "a", "label": null}\n', {}, r"a\.jsonl:1: no label"),
    ("a.json", '[{"text": "a", "label": 1}, {"text": "", "label": 0}]', {}, r"a\.json: row 2: expected a text"),
    ("a.txt", CSV, {}, r"a\.txt: the ending must be one of \.csv, \.tsv"),
]


@pytest.mark.parametrize(("name", "content", "options", "message"), BAD, ids=range(len(BAD)))
def test_one_clear_line(name: str, content: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as raised:
        read(write(tmp_path / name, content), **options)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.csv: No such file"):
        read_rows(tmp_path / "none.csv")
    with pytest.raises(DataError, match="an adversarial file alone is no task"):
        load_files(Files(adversarial=write(tmp_path / "a.csv", CSV)))


def test_dev_labels_are_the_training_sets(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", "text,label\na,pos\nb,neg\nc,neutral\n")
    dev = write(tmp_path / "dev.tsv", "text\tlabel\nd\tpos\n")
    data = load_files(Files(train=train, validation=dev, adversarial=dev), task="mood")
    assert data.validation is not None
    assert data.adversarial is not None
    assert (data.spec.name, data.spec.labels) == ("mood", ("neg", "neutral", "pos"))
    assert data.validation["label"] == data.adversarial["label"] == [2]
    for odd in ("odd", "0"):  # an id is not taken for a name where nobody has said which is which
        write(
            tmp_path / "dev.tsv",
            f"text\tlabel\nd\tpos\ne\t{odd}\n".replace("d\tpos\n", "" if odd == "0" else "d\tpos\n"),
        )
        with pytest.raises(DataError, match=rf"dev\.tsv:\d: label '{odd}' is not one of 'neg', 'neutral', 'pos'"):
            load_files(Files(train=train, validation=dev))


def test_a_trained_models_labels_by_name_or_id(tmp_path: Path) -> None:
    names = ("negative", "positive")
    for text in ("text,label\na,positive\nb,positive\n", "text,label\na,1\nb,1\n"):
        data = load_files(Files(validation=write(tmp_path / "dev.csv", text)), labels=names)
        assert data.validation is not None
        assert (data.validation["label"], data.spec.labels) == ([1, 1], names)
    with pytest.raises(DataError, match=r"dev\.csv:2: label '2' is not one of 'negative', 'positive'"):
        load_files(Files(validation=write(tmp_path / "dev.csv", "text,label\na,2\n")), labels=names)


def test_labels_in_other_spellings(tmp_path: Path) -> None:
    """As a model's are compared with a task's; exact ones first, and none that could be two labels."""

    def ids(labels: tuple[str, ...], *values: str) -> list[int]:
        rows = "".join(f"t,{value}\n" for value in values)
        data = load_files(Files(validation=write(tmp_path / "dev.csv", "text,label\n" + rows)), labels=labels)
        assert data.validation is not None and data.spec.labels == labels
        return list(data.validation["label"])

    assert ids(("NEGATIVE", "POSITIVE"), "positive", "Negative", "POSITIVE") == [1, 0, 1]
    assert ids(("not_entailment", "entailment"), "Entailment", "not-entailment", "Not Entailment") == [1, 0, 0]
    assert ids(("A", "a"), "a", "A") == [1, 0]
    assert ids(("Foo", "foo", "b"), "foo", "B") == [1, 2]
    with pytest.raises(DataError, match=r"dev\.csv:2: label 'FOO' is not one of 'Foo', 'foo', 'b'"):
        ids(("Foo", "foo", "b"), "FOO", "foo")
    assert ids(("LABEL_0", "LABEL_1"), "1", "0") == ids(("LABEL_0", "LABEL_1"), "label_1", "LABEL_0") == [1, 0]
    with pytest.raises(DataError, match=r"dev\.csv:2: label 'positive' is not one of 'LABEL_0', 'LABEL_1'"):
        ids(("LABEL_0", "LABEL_1"), "positive")


def test_names_that_look_like_other_numbers(tmp_path: Path) -> None:
    """Of a model from elsewhere: by its name first, and then as a number; an id where no row has either."""
    names = ("01", "02", "03")
    for values in ("01,03", "1,3", "1.0,3"):
        rows = "".join(f"t,{value}\n" for value in values.split(","))
        data = load_files(Files(validation=write(tmp_path / "dev.csv", "text,label\n" + rows)), labels=names)
        assert data.validation is not None and data.validation["label"] == [0, 2]
    two = ("1", "01")  # two labels to whoever made the model
    data = load_files(Files(validation=write(tmp_path / "dev.csv", "text,label\nt,01\nt,1\n")), labels=two)
    assert data.validation is not None and data.validation["label"] == [1, 0]


def test_a_spacing_that_meets_the_orders_period_is_refused(tmp_path: Path) -> None:
    """Rows in pairs of a positive and a negative one: every second row has one label."""
    path = write(tmp_path / "pairs.csv", "text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(400)))
    run = RunSettings(validation_file=str(path), max_eval_samples=200)
    with pytest.raises(DataError, match=r"other shares \(100%, 0%\) than all of them \(50%, 50%\)"):
        load_data(run, ("validation",))
    many = write(tmp_path / "many.csv", "text,label\n" + "".join(f"t{i},{i % 150}\n" for i in range(9000)))
    for count in (1, 4, 16, 64):  # of 150 labels: too few rows of each to say anything
        assert load_data(RunSettings(validation_file=str(many), max_eval_samples=count), ("validation",)).validation
    found = load_data(replace(run, max_eval_samples=133), ("validation",)).validation
    assert found is not None and 60 < sum(found["label"]) < 73


def test_a_folder_and_files_for_one_task_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "sentence,label\na,1\nb,0\n")
    run = RunSettings(task="sst2", data=str(tmp_path), validation_file=str(path))
    with pytest.raises(DataError, match="--validation_file"):
        load_data(run, ("validation",))
    own = RunSettings(task="mine", data=str(tmp_path), validation_file=str(path))  # a sweep's folder, of other tasks
    assert load_data(own, ("validation",)).spec.name == "mine"


# --- class weights ---


def test_balanced_weights() -> None:
    weights = weights_of(["balanced"], [0, 0, 0, 1], ("a", "b"))
    assert weights == pytest.approx([2 / 3, 2.0])
    assert sum(weights[y] for y in [0, 0, 0, 1]) == pytest.approx(4)
    assert weights_of(["1", "3"], [0, 1], ("a", "b")) == pytest.approx([0.5, 1.5])


@pytest.mark.parametrize(
    ("given", "labels", "message"),
    [
        (["balanced"], [0, 0], "no training row has the label 'b'"),
        (["1"], [0, 1], "has 1 numbers, but the labels are 'a', 'b'"),
        (["1", "0"], [0, 1], "'0' is neither a positive number nor balanced"),
        (["1", "x"], [0, 1], "'x' is neither"),
        (["1", "nan"], [0, 1], "'nan' is neither"),
    ],
)
def test_bad_weights(given: list[str], labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights_of(given, labels, ("a", "b"))


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    """Whatever the cut into micro-batches; with weights 1 it is the usual mean."""
    logits, labels = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    loss = weighted_loss([1.0, 0.5, 2.0], (1, 0, 2))  # the model has the first two the other way round
    whole = loss({"logits": logits}, labels)
    parts = [loss({"logits": logits[a:b]}, labels[a:b], torch.tensor(12)) for a, b in ((0, 5), (5, 6), (6, 12))]
    assert torch.stack(parts).sum() == pytest.approx(float(whole))
    each = F.cross_entropy(logits, labels, reduction="none")
    assert float(whole) == pytest.approx(float((each * torch.tensor([0.5, 1.0, 2.0])[labels]).mean()))
    usual = weighted_loss([1.0, 1.0, 1.0], (0, 1, 2), label_smoothing=0.1)({"logits": logits}, labels)
    assert float(usual) == pytest.approx(float(F.cross_entropy(logits, labels, label_smoothing=0.1)))


def test_a_finished_run_says_what_its_data_is(tmp_path: Path) -> None:
    config = {
        "task": "sst2",
        "data": "glue",
        "max_length": 64,
        "engine": "zero2",
        "record_masks": 5,
        "learning_rate": 1,
    }
    Metrics(task="sst2", model="minilm", config={**config, "train_file": None, "max_eval_samples": 7}).write(tmp_path)
    run = settings_of(str(tmp_path), {})
    assert (run.task, run.data, run.max_length, run.max_eval_samples, run.engine) == ("sst2", "glue", 64, 7, "auto")
    assert run.model == str(tmp_path)
    run = settings_of(str(tmp_path), {"validation_file": "b.csv", "max_length": 32, "search": "pruthi"})
    assert (run.task, run.data, run.validation_file, run.max_length) == ("snippets", None, "b.csv", 32)
    assert run.max_eval_samples is None  # seven of the other file's
    run = settings_of(str(tmp_path), {"adversarial_file": "hard.csv", "data": "elsewhere"})  # of the same task
    assert (run.task, run.data, run.adversarial_file, run.max_eval_samples) == ("sst2", "elsewhere", "hard.csv", 7)
    config = {"train_file": "a.csv", "validation_file": "a-dev.csv", "file_encoding": "latin-1", "task": "mine"}
    config |= {"drop_unlabelled": True}
    Metrics(task="mine", model="minilm", config=config).write(tmp_path)
    assert settings_of(str(tmp_path), {"text_columns": ["body"]}).file_encoding == "latin-1"
    assert settings_of(str(tmp_path), {"text_columns": ["body"]}).drop_unlabelled
    assert not settings_of(str(tmp_path), {"validation_file": "b.csv"}).drop_unlabelled
    config |= {"data": "glue"}  # of a sweep with other tasks
    Metrics(task="mine", model="minilm", config=config).write(tmp_path)
    assert settings_of(str(tmp_path), {}).data is None
    run = settings_of(str(tmp_path), {"validation_file": "b.csv"})
    assert (run.train_file, run.file_encoding) == (None, "utf-8")
    assert settings_of("minilm", {"task": "rte"}).task == "rte"
