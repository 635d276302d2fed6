"""A comparison as Markdown, CSV, a chart, and one page of HTML that needs no other file."""

from __future__ import annotations

import base64
import csv
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rose_ds.experiments.comparison.choice import ACCURACY, RECORDED
from rose_ds.experiments.comparison.gather import Comparison
from rose_ds.experiments.comparison.statistics import mean_sd
from rose_ds.experiments.comparison.table import Table
from rose_ds.experiments.comparison.tables import tables

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: #1d2129 }
h2 { margin: 2.2rem 0 .3rem; font-size: 1.15rem } p { margin: .2rem 0 .7rem; max-width: 60rem; color: #57606a }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #d8dee4; white-space: nowrap }
th { border-bottom: 2px solid #8c959f } th.text, td.text { text-align: left } img { max-width: 100% }
"""


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write report.md, report.html, report.png (with matplotlib) and a CSV file a table; returns the paths.

    Raises:
        ValueError: ``folder`` cannot be written, or answers do not fit each other.
    """
    made = [table for table in tables(comparison) if table.rows]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clear(folder)
        for table in made:
            with (folder / f"{table.key}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([table.header, *table.rows])
        chart = draw(comparison, folder / "report.png")
        (folder / "report.md").write_text("\n".join(map(markdown, made)), encoding="utf-8")
        written = [folder / "report.md", folder / "report.html", *([chart] if chart else [])]
        written += [folder / f"{table.key}.csv" for table in made]
        whole = page(made, chart, [path.name for path in written])
        (folder / "report.html").write_text(whole, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from error
    return written


def clear(folder: Path) -> None:
    """Delete an earlier report, some of whose tables may not be there any more. Its page names its files: nothing else
    in the folder is touched.

    Raises:
        ValueError: it cannot be deleted.
    """
    page = folder / "report.html"
    try:
        if page.is_file() and (named := _FILES.search(page.read_text(encoding="utf-8", errors="replace"))):
            for name in named[1].split():
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"cannot delete the earlier report in {folder}: {error.strerror}") from error


#: Where a page names what was written with it.
_FILES = re.compile(r'<meta name="rose-ds-files" content="([\w. -]+)">')


def markdown(table: Table) -> str:
    """A table with its title and note."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [table.header, *table.rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return f"## {table.title}\n\n{table.note}\n\n" + "\n".join(lines) + "\n"


def page(made: Sequence[Table], chart: Path | None, files: Sequence[str] = ()) -> str:
    """All tables and the chart, in one file; ``files`` are those that were written with it."""
    parts = [f"<h1>Robustness of fine-tuning methods</h1>\n{_image(chart)}"]
    for table in made:
        words = [
            not any(row[i][:1].isdigit() or row[i][:1] in "+-" for row in table.rows) for i in range(len(table.header))
        ]
        rows = "\n".join(_row("td", row, words) for row in table.rows)
        parts.append(
            f"<h2>{html.escape(table.title)}</h2>\n<p>{html.escape(table.note)}</p>\n<div class=scroll><table>\n"
            f"{_row('th', table.header, words)}\n{rows}\n</table></div>"
        )
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f'<meta name="rose-ds-files" content="{html.escape(" ".join(files))}">'
    return (
        f"<!doctype html><html lang=en><head>{head}<title>rose-ds report</title><style>{_STYLE}</style></head><body>\n"
        + ("\n".join(parts) + "\n</body></html>\n")
    )


def _row(tag: str, cells: Sequence[str], words: Sequence[bool]) -> str:
    made = (
        f"<{tag}{' class=text' if word else ''}>{html.escape(cell)}</{tag}>"
        for cell, word in zip(cells, words, strict=True)
    )
    return "<tr>" + "".join(made) + "</tr>"


def _image(chart: Path | None) -> str:
    if chart is None:
        return ""
    content = base64.b64encode(chart.read_bytes()).decode()
    return f'<img alt="Accuracy by method and task" src="data:image/png;base64,{content}">'


def draw(comparison: Comparison, path: Path) -> Path | None:
    """A row of panels a task: accuracies with standard deviations, and the way along training; None where matplotlib is
    not installed or nothing is finished.
    """
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = [task for task in comparison.tasks if any(t == task for t, _ in comparison.entries)]
    if not tasks:
        return None
    figure, panels = pyplot.subplots(len(tasks), 2, figsize=(13, 3.8 * len(tasks)), squeeze=False)
    colours = pyplot.get_cmap("tab20").colors
    for (bars, curves), task in zip(panels, tasks, strict=True):
        methods = [method for method in comparison.methods if (task, method) in comparison.entries]
        for i, method in enumerate(methods):
            colour = colours[comparison.methods.index(method) % len(colours)]
            _draw_bars(
                bars,
                comparison,
                task,
                method,
                (i - (len(methods) - 1) / 2) * 0.8 / len(methods),
                0.75 / len(methods),
                colour,
            )
            _draw_way(curves, comparison, task, method, colour)
        bars.set_xticks(range(len(RECORDED)), list(RECORDED))
        bars.set(title=task, ylabel="accuracy (%)")
        curves.set(title=f"{task}, along training", xlabel="clean accuracy (%)", ylabel="AdvGLUE, else perturbed (%)")
        for text in bars.legend(frameon=False, fontsize=7, ncols=2).get_texts():
            text.set_parse_math(False)  # a dollar sign in a name is a dollar sign
        for axes in (bars, curves):
            axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _draw_bars(axes: Any, c: Comparison, task: str, method: str, shift: float, width: float, colour: Any) -> None:
    label: str | None = method
    for j, name in enumerate(RECORDED):
        values = [value for value in (ACCURACY[name](run) for run in c.entries[task, method].runs) if value is not None]
        if values:
            mean, sd = mean_sd([100 * value for value in values])
            axes.bar(j + shift, mean, width, yerr=sd, color=colour, label=label, error_kw={"lw": 0.8})
            label = None


def _draw_way(axes: Any, c: Comparison, task: str, method: str, colour: Any) -> None:
    for run in c.entries[task, method].runs:
        points = [(p["clean"], p.get("adversarial", p.get("perturbed"))) for p in run.trajectory if "clean" in p]
        known = [(100 * x, 100 * y) for x, y in points if y is not None]
        if known:
            axes.plot(*zip(*known, strict=True), marker=".", lw=0.7, color=colour, alpha=0.7)
