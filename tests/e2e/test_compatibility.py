"""docs/compatibility.md says what happens: every row of it, tried."""

from __future__ import annotations

import importlib.util

import pytest
from compatibility import PAGE, ROWS, TRAINERS, line_of


@pytest.mark.parametrize("row", ROWS)
def test_row(row: str) -> None:
    section, _, name = row.partition("/")
    if section == "trainer" and importlib.util.find_spec(TRAINERS[name][2]) is None:
        pytest.skip(f"{TRAINERS[name][2]} is not installed")
    assert line_of(row, ROWS[row]()) in PAGE.read_text().splitlines()


def test_no_row_too_many() -> None:
    listed = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and not line.startswith("| |")]
    assert len([line for line in listed if "---" not in line]) == len(ROWS)
