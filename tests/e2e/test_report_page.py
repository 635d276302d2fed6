"""The page of a store's report in a real browser."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from launching import ROOT, run

from rose_ds.cli import main

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")

BROWSER = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,2000"]


class Rows(HTMLParser):
    """Counts what a browser has made of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.count = {"table": 0, "tr": 0, "img": 0}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.count:
            self.count[tag] += 1


def test_a_browser_shows_every_table(tmp_path: Path) -> None:
    """Of the committed results on learning rates, whose runs are few."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    main(["report", "--store", str(ROOT / "results" / "lr"), "--output_dir", str(tmp_path)])
    page = (tmp_path / "report.html").as_uri()
    shown = Rows()
    shown.feed(run([*BROWSER, "--dump-dom", page], timeout=120).stdout)
    tables = [path.read_text().splitlines() for path in tmp_path.glob("*.csv")]
    assert shown.count == {"table": len(tables), "tr": sum(map(len, tables)), "img": 1}
    picture = tmp_path / "page.png"
    run([*BROWSER, f"--screenshot={picture}", page], timeout=120)
    pixels = pyplot.imread(picture)[:, :, :3]
    chart = pixels[100:900]
    assert pixels.shape[1] == 1300 and len(np.unique(chart.reshape(-1, 3), axis=0)) > 50  # colours of the chart's bars
