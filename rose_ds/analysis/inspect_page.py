"""One page on what the masks of runs did: which layers they kept, how stable they were, what the risks looked like."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rose_ds.analysis.pictures import COLOURS

_ORDERS = {"first": "first order (KL gradient)", "second": "second order (gradient against momentum)"}
#: plotly measures a figure's place before the grid has given it one.
_RESIZE = '<script>addEventListener("load", () => dispatchEvent(new Event("resize")))</script>'
_STYLE = """
:root { color-scheme: light; font: 16px/1.5 system-ui, sans-serif; }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin: 2rem 0 0.25rem; } h3 { font-size: 1rem; margin: 0.5rem 0 0; }
p { max-width: 46rem; margin: 0.25rem 0; }
.runs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.run { min-width: 0; overflow-x: auto; }
table { border-collapse: collapse; } td, th { padding: 0.15rem 0.75rem 0.15rem 0; text-align: left; }
"""


@dataclass(frozen=True)
class Record:
    """A run's masks."""

    name: str
    head: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]

    @property
    def orders(self) -> list[str]:
        """Which of first and second it has."""
        return [order for order in _ORDERS if order in self.lines[-1]["kept"]]


def page(records: Sequence[Record]) -> str:
    """The page: a file of its own, which needs no network.

    Raises:
        ValueError: a run has no recorded step, or plotly is not installed.
    """
    for record in records:
        if not record.lines:
            raise ValueError(f"{record.name} has no recorded step: its masks began later, or it keeps everything")
    figures = _Figures()
    orders = [order for order in _ORDERS if any(order in record.orders for record in records)]
    parts = [
        "<h1>What the masks did</h1>",
        "<p>At every optimizer step ROSE updates only a part of the weights. This page shows which part that was. A "
        "number of kept weights is always a fraction of those that may be masked.</p>",
        _summary(records),
    ]
    for order in orders:
        parts.append(f"<h2>Kept by layer and kind of weight: {_ORDERS[order]}</h2>")
        parts.append("<p>Mean over the recorded steps. Bright: often updated. Dark: often frozen.</p>")
        parts.append(_side_by_side(records, order, lambda r, o=order: figures.by_module(r, o)))
        parts.append(f"<h2>Kept by layer over time: {_ORDERS[order]}</h2>")
        parts.append(
            "<p>A column is a recorded step, a row a layer. Stripes along time: the same layers all along.</p>"
        )
        parts.append(_side_by_side(records, order, lambda r, o=order: figures.over_time(r, o)))
        parts.append(f"<h2>Risks: {_ORDERS[order]}</h2>")
        parts.append(
            "<p>How many risks lie in each power of two, in the first, a middle and the last recorded step; what lies "
            "left of the threshold (the vertical line) is kept.</p>"
        )
        parts.append(_side_by_side(records, order, lambda r, o=order: figures.risks(r, o)))
    parts.append("<h2>Thresholds</h2><p>The largest risk that was still kept, on a logarithmic scale.</p>")
    parts.append(_side_by_side(records, None, figures.thresholds))
    parts.append(
        "<h2>How stable is the mask?</h2><p>The fraction of weights whose mask is the same as in the record before. "
        "Two random masks of this size would agree on the dotted line; what lies near it is mostly sampling noise.</p>"
    )
    parts.append(_side_by_side(records, None, figures.stability))
    title = html.escape("Masks of " + ", ".join(record.name for record in records))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + _RESIZE + "\n</body></html>\n"
    )


def _summary(records: Sequence[Record]) -> str:
    rows = ["<tr><th>run</th><th>strategy</th><th>weights that may be masked</th><th>recorded steps</th></tr>"]
    for record in records:
        steps = [line["step"] for line in record.lines]
        rows.append(
            f"<tr><td>{html.escape(record.name)}</td><td>{html.escape(record.head['strategy'])} "
            f"({html.escape(record.head['granularity'])})</td><td>{sum(record.head['sizes']):,}</td>"
            f"<td>{len(steps)} ({steps[0]} to {steps[-1]})</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def _side_by_side(records: Sequence[Record], order: str | None, draw: Any) -> str:
    shown = [r for r in records if order is None or order in r.orders]
    return (
        '<div class="runs">'
        + "".join(f'<div class="run"><h3>{html.escape(r.name)}</h3>{draw(r)}</div>' for r in shown)
        + "</div>"
    )


class _Figures:
    """plotly's, whose script goes into the page with the first of them."""

    def __init__(self) -> None:
        try:
            from plotly import graph_objects
        except ImportError as error:
            raise ValueError("the page needs plotly: pip install 'rose_ds[analysis]'") from error
        self.go = graph_objects
        self._with_script = True

    def by_module(self, record: Record, order: str) -> str:
        layers, kinds, place = _modules(record.head["names"])
        table: list[list[float | None]] = [[None] * len(layers) for _ in kinds]
        for i, (kind, layer) in enumerate(place):
            kept = [line["kept"][order][i] for line in record.lines if order in line["kept"]]
            table[kinds.index(kind)][layers.index(layer)] = sum(kept) / len(kept)
        return self._heat(table, layers, kinds, "layer", 60 + 28 * len(kinds))

    def over_time(self, record: Record, order: str) -> str:
        layers, _, place = _modules(record.head["names"])
        sizes, lines = record.head["sizes"], [line for line in record.lines if order in line["kept"]]
        table: list[list[float | None]] = []
        for layer in layers:
            mine = [i for i, (_, where) in enumerate(place) if where == layer]
            whole = sum(sizes[i] for i in mine)
            table.append([sum(line["kept"][order][i] * sizes[i] for i in mine) / whole for line in lines])
        return self._heat(
            table, [line["step"] for line in lines], [f"layer {n}" for n in layers], "step", 90 + 24 * len(layers)
        )

    def risks(self, record: Record, order: str) -> str:
        lines = [line for line in record.lines if line["risks"].get(order)]
        chosen = [lines[i] for i in sorted({0, len(lines) // 2, len(lines) - 1})] if lines else []
        figure = self.go.Figure()
        for line, colour in zip(chosen, COLOURS, strict=False):
            # an octave's middle, from which its step is drawn half an octave to both sides
            bins = [(2.0 ** (e + 0.5), n) for e, n in line["risks"][order] if e is not None]
            total = sum(n for _, n in line["risks"][order])
            figure.add_scatter(
                x=[x for x, _ in bins],
                y=[n / total for _, n in bins],
                mode="lines+markers",
                line_shape="hvh",
                line_color=colour,
                name=f"step {line['step']}",
            )
            if line["tau"][order] > 0:
                figure.add_vline(x=line["tau"][order], line_color=colour, line_dash="dot")
        figure.update_xaxes(type="log", title="risk", exponentformat="power")
        figure.update_yaxes(title="fraction of weights", tickformat=".0%")
        return self._written(figure, 320)

    def thresholds(self, record: Record) -> str:
        figure = self.go.Figure()
        for order, colour in zip(record.orders, COLOURS, strict=False):
            lines = [line for line in record.lines if line["tau"].get(order)]
            _over_steps(figure, lines, lambda line, o=order: line["tau"][o], name=order, line_color=colour)
        figure.update_yaxes(type="log", title="threshold", exponentformat="power")
        figure.update_xaxes(title="optimizer step")
        return self._written(figure, 300)

    def stability(self, record: Record) -> str:
        figure, sizes = self.go.Figure(), record.head["sizes"]
        for order, colour in zip(record.orders, COLOURS, strict=False):
            lines = [line for line in record.lines if order in line["same"]]
            if not lines:
                continue
            last = lines[-1]["kept"][order]
            kept = sum(k * n for k, n in zip(last, sizes, strict=True)) / sum(sizes)
            _over_steps(figure, lines, lambda line, o=order: line["same"][o], name=order, line_color=colour)
            figure.add_hline(y=kept**2 + (1 - kept) ** 2, line_color=colour, line_dash="dot")
        both = [line for line in record.lines if "both" in line]
        if both:
            style = {"mode": "lines", "line_color": COLOURS[2], "line_dash": "dash"}
            _over_steps(figure, both, lambda line: line["both"], name="kept by both orders", **style)
        figure.update_yaxes(range=[0, 1], tickformat=".0%", title="of the weights")
        figure.update_xaxes(title="optimizer step")
        return self._written(figure, 300)

    def _heat(
        self, table: Sequence[Sequence[float | None]], x: Sequence[Any], y: Sequence[str], label: str, height: int
    ) -> str:
        figure = self.go.Figure(
            self.go.Heatmap(
                z=table,
                x=x,
                y=y,
                zmin=0,
                zmax=1,
                colorscale="Cividis",
                colorbar={"tickformat": ".0%", "thickness": 12},
                hovertemplate="%{y}, " + label + " %{x}: kept %{z:.1%}<extra></extra>",
            )
        )
        figure.update_xaxes(title=label)
        figure.update_yaxes(autorange="reversed", tickfont={"size": 10})
        return self._written(figure, height)

    def _written(self, figure: Any, height: int) -> str:
        figure.update_layout(
            height=height,
            margin={"l": 10, "r": 10, "t": 10, "b": 40},
            template="plotly_white",
            legend={"orientation": "h", "y": 1.12},
            font={"size": 12},
        )
        script, self._with_script = self._with_script, False
        written: str = figure.to_html(
            full_html=False, include_plotlyjs=script, config={"responsive": True, "displayModeBar": False}
        )
        return written


def _over_steps(figure: Any, lines: Sequence[Mapping[str, Any]], value: Any, **style: Any) -> None:
    """Draw a number of each record against its step."""
    points = {"x": [line["step"] for line in lines], "y": [value(line) for line in lines]}
    figure.add_scatter(**points, **{"mode": "lines+markers", **style})


def _modules(names: Sequence[str]) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """Layers, kinds of weight, and (kind, layer) of each name; what has no number is layer -1. Layers of several lists
    (an encoder and a decoder) have their list's name before the number.
    """
    numbers = [re.search(r"\.(\d+)\.", name) for name in names]
    lists = list(dict.fromkeys(name[: n.start()] for name, n in zip(names, numbers, strict=True) if n is not None))
    place, order = [], dict[str, tuple[int, int]]()
    for name, number in zip(names, numbers, strict=True):
        if number is None:
            kind, layer, at = name, "-1", (-1, -1)
        else:
            kind = name[number.end() :].removesuffix(".weight")
            at = lists.index(name[: number.start()]), int(number[1])
            layer = number[1] if len(lists) == 1 else f"{lists[at[0]]}.{number[1]}"
        place.append((kind, layer))
        order[layer] = at
    return sorted(order, key=order.__getitem__), list(dict.fromkeys(kind for kind, _ in place)), place


def write_page(records: Sequence[Record], path: Path) -> Path:
    """Write the page."""
    text = page(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
