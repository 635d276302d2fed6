"""Rows of one's own files: CSV, TSV, JSON lines and Parquet, each row with the number by which a person finds it.

Not datasets' own CSV reader: it renames a second column of the same name, reads the texts "NA" and "null" as nothing,
leaves out empty lines, and cannot say which line is wrong.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from datasets import ClassLabel, Dataset
from pyarrow import parquet

from rose_ds.data.errors import DataError

logger = logging.getLogger(__name__)

#: One field of a CSV file may be a long document.
_FIELD_LIMIT = 2**27
_QUOTED = re.compile('"[^"]*(?:"|$)')
#: Excel's first line of a CSV file, which says the delimiter.
_SEP = re.compile('sep=([^"\r\n\0])\r?\n')
_BOMS = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be", codecs.BOM_UTF8: "utf-8"}
_UNSAID = "utf-8"


@dataclass(frozen=True)
class Rows:
    """A file's columns, as they are written."""

    path: Path
    names: list[str]
    """Of all columns, in order; one may occur twice."""
    rows: list[tuple[int, list[Any]]]
    """Where each row begins, see ``unit``, and its values, one a name."""
    unit: str = "line"
    label_names: Sequence[str] | None = None
    """Of the label column's ids, where the file itself says them (Parquet written by ``datasets``)."""

    def where(self, number: int) -> str:
        """A row, for a message."""
        return f"{self.path}:{number}" if self.unit == "line" else f"{self.path}: row {number}"

    def column(self, name: str) -> int:
        """The position of a column. Raises DataError where there is none, or two."""
        if self.names.count(name) != 1:
            problem = "occurs twice" if name in self.names else "is not there"
            raise DataError(
                f"{self.where(1)}: column {name!r} {problem}; found: {', '.join(map(repr, self.names)):.400}"
            )
        return self.names.index(name)


def read_rows(path: Path, encoding: str = _UNSAID, label_column: str | None = None) -> Rows:
    """Read a file by its ending: .csv, .tsv, .jsonl, .json, .parquet.

    Args:
        encoding: of a text file. A byte-order mark goes before it, unless the content contradicts the mark.
        label_column: whose names of ids are wanted.

    Raises:
        DataError: it cannot be read, or a row is not one; names file and line.
    """
    readers: dict[str, Callable[[], Rows]] = {
        ".csv": lambda: _csv(path, _text(path, encoding)),
        ".tsv": lambda: _tsv(path, _text(path, encoding)),
        ".jsonl": lambda: _json_lines(path, _text(path, encoding)),
        ".json": lambda: _json_lines(path, _text(path, encoding)),
        ".parquet": lambda: _parquet(path, label_column),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: the ending must be one of {', '.join(readers)}")
    try:
        rows = reader()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if not rows.rows:
        raise DataError(f"{path} has no rows")
    return rows


def _text(path: Path, encoding: str) -> str:
    content = path.read_bytes()
    mark = next((mark for mark in _BOMS if content.startswith(mark)), None)
    if mark is None:
        return _decoded(path, content, encoding)
    content, marked = content.removeprefix(mark), _BOMS[mark]
    try:
        return _decoded(path, content, marked)
    except DataError as error:
        if encoding == _UNSAID:
            raise DataError(f"{error} (its byte-order mark says {marked}, which its content contradicts)") from error
    text = _decoded(path, content, encoding)
    logger.warning("%s: its byte-order mark says %s, which its content contradicts: read as %s", path, marked, encoding)
    return text


def _decoded(path: Path, content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding)
    except LookupError as error:
        raise DataError(
            f"file_encoding={encoding!r} is no encoding that Python knows, such as utf-8 or latin-1"
        ) from error
    except UnicodeDecodeError as error:
        # counted in the text before the bad byte, for in UTF-16 the byte 0x0a is a part of other characters too
        line = content[: error.start].decode(encoding, "replace").count("\n") + 1
        raise DataError(
            f"{path}:{line}: byte 0x{content[error.start]:02x} is not {encoding}: say what it is with --file_encoding, "
            "e.g. latin-1 or cp1252"
        ) from error


def _csv(path: Path, text: str) -> Rows:
    """RFC 4180: fields with commas, quotes or line ends stand in quotes. Or the same with the delimiter that a line
    "sep=;" before the header says; or with semicolons, as spreadsheets write it where the comma is the decimal sign.
    """
    if said := _SEP.match(text):
        delimiter = said[1]
        text = "\n" + text[said.end() :]  # an empty line in its place: the others keep their numbers
        logger.info("%s: columns are separated by %r, as its first line says", path, delimiter)
    else:
        header = next((line for line in io.StringIO(text, newline="") if line.strip()), "")
        bare = _QUOTED.sub("", header)
        delimiter = ";" if ";" in bare and "," not in bare else ","  # a file of one column has no texts with labels
        if delimiter == ";":
            logger.info("%s: the header has semicolons and no comma: columns are separated by ';'", path)
    csv.field_size_limit(_FIELD_LIMIT)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    return _checked(path, _numbered(path, reader), delimiter)


def _numbered(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}:{number}: {error}: is a quote left open, or not doubled inside quotes?") from error
        yield number, cells


def _tsv(path: Path, text: str) -> Rows:
    """As GLUE's: no quoting, a quote is text. Split at \\n only, for texts hold other line separators."""
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    numbered = ((number, line.split("\t") if line else []) for number, line in enumerate(lines, start=1))
    return _checked(path, numbered, "\t")


def _checked(path: Path, numbered: Iterator[tuple[int, list[str]]], delimiter: str) -> Rows:
    filled = ((number, cells) for number, cells in numbered if any(cell.strip() for cell in cells))
    _, names = next(filled, (1, []))
    if not names:
        raise DataError(f"{path} is empty")
    rows: list[tuple[int, list[Any]]] = []
    for number, cells in filled:
        if len(cells) != len(names):
            raise DataError(
                f"{path}:{number}: {len(cells)} columns, but the header has {len(names)} (separated by {delimiter!r})"
            )
        rows.append((number, list(cells)))
    return Rows(path, [name.strip() for name in names], rows)


def _json_lines(path: Path, text: str) -> Rows:
    items: Iterator[tuple[int, Any]]
    if text.lstrip().startswith("["):
        items, unit = enumerate(_parsed(path, 1, text), start=1), "row"
    else:
        lines = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
        items, unit = ((number, _parsed(path, number, line)) for number, line in lines), "line"
    found, objects = Rows(path, [], [], unit), list[tuple[int, dict[str, Any]]]()
    for number, item in items:
        if not isinstance(item, dict):
            raise DataError(f"{found.where(number)}: expected an object with a field a column, found {item!r:.80}")
        objects.append((number, item))
    found.names.extend(dict.fromkeys(name for _, item in objects for name in item))
    # None where a row lacks a field: whoever reads a text or a label refuses it, other fields are optional
    found.rows.extend((number, [item.get(name) for name in found.names]) for number, item in objects)
    return found


def _parsed(path: Path, number: int, text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"a field occurs twice in {[name for name, _ in pairs]}")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{number}: not JSON: {error}") from error


def _parquet(path: Path, label_column: str | None) -> Rows:
    try:
        dataset = Dataset(parquet.read_table(path))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not Parquet: {str(error).splitlines()[0]}") from error
    return rows_of(dataset, path, label_column)


def rows_of(dataset: Dataset, path: Path, label_column: str | None) -> Rows:
    """The rows of a data set that is called ``path``, with its own names of labels."""
    feature = dataset.features.get(label_column or "")
    columns = dataset.to_dict()
    rows = [(number, list(values)) for number, values in enumerate(zip(*columns.values(), strict=True), start=1)]
    return Rows(path, list(columns), rows, "row", feature.names if isinstance(feature, ClassLabel) else None)
