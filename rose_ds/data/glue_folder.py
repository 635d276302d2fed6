"""GLUE and AdvGLUE from a folder in GLUE's own layout."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value

from rose_ds.data.errors import DataError
from rose_ds.data.tasks import TASKS, TaskSpec

LAYOUT = (
    ", ".join(f"{spec.folder}/{{train,dev}}.tsv" for spec in TASKS.values() if spec.folder)
    + " and, for the adversarial sets, AdvGLUE/dev.json"
)

UNTEXT = re.compile("[\0\ud800-\udfff]")

# A file with this many bad rows or fewer gets a ready command that deletes them; with more it is the wrong file.
_FEW_BAD_ROWS = 20


def task_features(spec: TaskSpec) -> Features:
    """The columns every split of the task has, whichever source it comes from; the types are the hub's."""
    texts = {field: Value("string") for field in spec.fields}
    return Features({**texts, "label": ClassLabel(names=list(spec.labels)), "idx": Value("int32")})


def load_folder(spec: TaskSpec, splits: Iterable[str], root: Path) -> dict[str, Dataset | None]:
    """Read the splits of one task from `root`; "adversarial" is None where `root` has no AdvGLUE/dev.json.

    Raises:
        DataError: a folder, file or column is missing, or rows are corrupt; names the file and the 1-based lines.
    """
    if not os.path.isdir(root):  # noqa: PTH112  Path's raises where the name is too long
        raise DataError(f"{root} is not a folder; --data wants a folder with {LAYOUT}")
    readers = {"train": _read_tsv, "validation": _read_tsv, "adversarial": _read_advglue}
    paths = {
        "train": root / str(spec.folder) / "train.tsv",
        "validation": root / str(spec.folder) / "dev.tsv",
        "adversarial": root / "AdvGLUE" / "dev.json",
    }
    return {
        split: None if split == "adversarial" and not paths[split].exists() else readers[split](spec, paths[split])
        for split in splits
    }


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); --data wants a folder with {LAYOUT}") from error


def _read_tsv(spec: TaskSpec, path: Path) -> Dataset:
    # Split at \n only: GLUE texts hold other characters that str.splitlines() takes for line ends. A quote is text.
    header, *lines = _read_bytes(path).removesuffix(b"\n").split(b"\n")
    names = header.decode("utf-8-sig", errors="replace").rstrip("\r").split("\t")  # a BOM is not part of a name
    wanted = (*spec.fields, spec.tsv_label)
    missing = [name for name in wanted if name not in names]
    found = ", ".join(map(repr, names))
    if missing:
        raise DataError(
            f"{path}:1: no column {', '.join(map(repr, missing))}; {spec.name} needs the tab-separated columns "
            f"{', '.join(wanted)}, found: {found:.400}"
        )
    if any(names.count(name) > 1 for name in wanted):
        raise DataError(f"{path}:1: a column occurs twice: {found:.400}")
    if not lines:
        raise DataError(f"{path} has a header but no rows")

    positions = [names.index(name) for name in wanted]
    columns: dict[str, list[Any]] = {name: [] for name in (*spec.fields, "label", "idx")}
    bad: dict[int, str] = {}
    for number, line in enumerate(lines, start=2):
        try:
            cells = _cells(line, len(names))
            *texts, value = (cells[position] for position in positions)
            label = _checked(texts, value, spec.fields, spec.tsv_values)
        except ValueError as error:
            bad[number] = str(error)
            continue
        for field, text in zip(spec.fields, texts, strict=True):
            columns[field].append(text)
        columns["label"].append(label)
        columns["idx"].append(number - 2)  # 0-based position in the file: the hub's idx
    if bad:
        raise DataError(_report(path, bad))
    return Dataset.from_dict(columns, features=task_features(spec))


def _cells(line: bytes, expected: int) -> list[str]:
    cells = line.decode("utf-8").rstrip("\r").split("\t")  # UnicodeDecodeError is a ValueError too
    if len(cells) != expected:
        raise ValueError(f"expected {expected} columns ({expected - 1} tabs), found {len(cells)}")
    return cells


def _checked(texts: list[Any], label: Any, fields: tuple[str, ...], labels: tuple[Any, ...]) -> int:
    """The label's id, once the texts are known to be texts."""
    for field, text in zip(fields, texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"expected a text in {field!r}, found {text!r:.80}")
        if UNTEXT.search(text):
            raise ValueError(f"{field!r} has a NUL or half a surrogate pair, as damaged files do: {text!r:.80}")
    if type(label) is not type(labels[0]) or label not in labels:  # in JSON, true must not pass for 1
        raise ValueError(f"expected the label {' or '.join(map(repr, labels))}, found {label!r:.80}")
    return labels.index(label)


def _report(path: Path, bad: dict[int, str]) -> str:
    first = "\n".join(f"{path}:{number}: {problem}" for number, problem in list(bad.items())[:5])
    if len(bad) > _FEW_BAD_ROWS:
        return f"{first}\n{len(bad)} such rows in all: is this the right file?"
    delete = "".join(f"{number}d;" for number in bad).rstrip(";")
    return (
        f"{first}\n{len(bad)} bad row(s) in all. Nothing is dropped silently (GLUE's own QQP files have a few rows "
        f"without a question): correct them, or delete them with: sed -i '{delete}' '{path}'"
    )


def read_adversarial(spec: TaskSpec, path: Path) -> Dataset:
    """AdvGLUE's or AdvGLUE++'s items of a task, from one JSON file or all that a folder has: objects with a list of
    items a task. An item that an earlier file has too is taken once: AdvGLUE comes with and without annotations.

    Raises:
        DataError: no file has the task, or an item is not one; names file and item.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    columns: dict[str, list[Any]] = {name: [] for name in (*spec.fields, "label", "idx")}
    seen: set[tuple[Any, ...]] = set()
    for file in files:
        content = _json(file)
        if len(files) > 1 and not (isinstance(content, dict) and spec.adv_key in content):
            continue
        items = _items(spec, file, content)
        numbered = [{"idx": n, **item} if isinstance(item, dict) else item for n, item in enumerate(items)]
        for row in _advglue_rows(spec, file, numbered):
            what = tuple(row[name] for name in (*spec.fields, "label"))
            if what not in seen:
                seen.add(what)
                for name, values in columns.items():
                    values.append(row[name])
    if not columns["label"]:
        raise DataError(f"{path}: no JSON file here has items under the key {spec.adv_key!r}")
    return Dataset.from_dict(columns, features=task_features(spec))


def _read_advglue(spec: TaskSpec, path: Path) -> Dataset:
    rows = _advglue_rows(spec, path, _items(spec, path, _json(path)))
    columns = {name: [row[name] for row in rows] for name in (*spec.fields, "label", "idx")}
    return Dataset.from_dict(columns, features=task_features(spec))


def _json(path: Path) -> Any:
    try:
        return json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:  # broken JSON, or bytes that are not UTF-8
        raise DataError(f"{path} is not JSON: {error}") from error


def _items(spec: TaskSpec, path: Path, content: Any) -> list[Any]:
    items = content.get(spec.adv_key) if isinstance(content, dict) else None
    if not isinstance(items, list) or not items:
        found = ", ".join(map(repr, content)) if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path}: expected a list of items under the key {spec.adv_key!r}, found: {found:.400}")
    return items


def _advglue_rows(spec: TaskSpec, path: Path, items: list[Any]) -> list[dict[str, Any]]:
    """Items that have been checked."""
    names = (*spec.fields, "label", "idx")
    ids = tuple(range(len(spec.labels)))
    for number, item in enumerate(items):
        where = f"{path}: {spec.adv_key}[{number}]"
        missing = [name for name in names if not isinstance(item, dict) or name not in item]
        if missing:
            raise DataError(f"{where}: no field {', '.join(map(repr, missing))}; an item needs {', '.join(names)}")
        try:
            _checked([item[field] for field in spec.fields], item["label"], spec.fields, ids)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        if type(item["idx"]) is not int:
            raise DataError(f"{where}: expected an integer in 'idx', found {item['idx']!r:.80}")
        if not -(2**31) <= item["idx"] < 2**31:
            raise DataError(f"{where}: 'idx' must fit in 32 bits, found {item['idx']}")
    return items
