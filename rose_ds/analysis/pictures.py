"""Pictures of what was measured: PNG and SVG by matplotlib, and a page that turns by plotly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

#: Okabe and Ito's, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LEVELS = 16


def landscape(models: Mapping[str, Mapping[str, Any]], steps: Sequence[float], folder: Path) -> list[Path]:
    """Contours and surfaces of several models on one colour scale: landscape.png, .svg and .html.

    Args:
        models: by name, with ``loss`` (points, points).
        steps: along a side.
    """
    pyplot = _pyplot()
    surfaces = {name: np.asarray(model["loss"]) for name, model in models.items()}
    low = min(s.min() for s in surfaces.values())
    high = max(np.quantile(s, 0.98) for s in surfaces.values())  # a corner that explodes would hide the rest
    levels = np.linspace(low, max(high, low + 1e-6), _LEVELS)
    grid = np.meshgrid(steps, steps, indexing="ij")
    figure = pyplot.figure(figsize=(4.2 * len(surfaces), 7.4), layout="constrained")
    drawn = None
    for column, (name, loss) in enumerate(surfaces.items(), start=1):
        shown = np.clip(loss, low, levels[-1])
        axes = figure.add_subplot(2, len(surfaces), column)
        drawn = axes.contourf(*grid, shown, levels=levels, cmap="cividis")
        axes.contour(*grid, shown, levels=levels[::3], colors="white", linewidths=0.5)
        axes.plot(0, 0, marker="+", color="white", markersize=10)
        axes.set_title(name, parse_math=False, fontsize=10)
        axes.set_xlabel("step along direction 1")
        axes.set_ylabel("step along direction 2")
        axes.set_aspect("equal")
        space = figure.add_subplot(2, len(surfaces), len(surfaces) + column, projection="3d")
        space.plot_surface(*grid, shown, cmap="cividis", vmin=low, vmax=levels[-1], linewidth=0)
        space.set_zlim(low, levels[-1])
        space.set_zlabel("loss")
    figure.colorbar(drawn, ax=figure.axes[::2], label="loss", shrink=0.8)
    return [*_save(figure, folder / "landscape"), _turning(surfaces, steps, low, float(levels[-1]), folder)]


def interpolation(
    points: Sequence[Mapping[str, float]], sets: Sequence[str], names: tuple[str, str], folder: Path
) -> list[Path]:
    """Loss and accuracy on two axes (the paper's Figure 4), a panel a set: interpolation.png and .svg."""
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, len(sets), figsize=(4.6 * len(sets), 3.8), layout="constrained", squeeze=False)
    a = [point["a"] for point in points]
    for axes, name in zip(panels[0], sets, strict=True):
        axes.plot(a, [p[f"{name}_loss"] for p in points], color=COLOURS[0], marker="o", markersize=3, label="loss")
        axes.set_xlabel("a")
        axes.set_ylabel("loss", color=COLOURS[0])
        right = axes.twinx()
        accuracies = [100 * p[f"{name}_accuracy"] for p in points]
        right.plot(a, accuracies, color=COLOURS[1], linestyle="--", marker="s", markersize=3, label="accuracy")
        right.set_ylabel("accuracy (%)", color=COLOURS[1])
        for where, model in zip((0, 1), names, strict=True):
            axes.axvline(where, color="0.6", linewidth=0.8)
            axes.annotate(
                model,
                (where, 1.0),
                xycoords=("data", "axes fraction"),
                fontsize=7,
                parse_math=False,
                ha="center",
                va="bottom",
            )
        axes.set_title(name, pad=16)
    return _save(figure, folder / "interpolation")


def strips(
    values: Mapping[str, Mapping[str, Sequence[float]]], label: str, title: str, path: Path, limits: tuple[float, float]
) -> list[Path]:
    """A strip plot (Figure 3): a column a group, a colour a model, a dot a seed, a line for the mean."""
    pyplot = _pyplot()
    groups = list(next(iter(values.values())))
    figure, axes = pyplot.subplots(figsize=(1.6 + 1.5 * len(groups), 3.8), layout="constrained")
    width = 0.7 / len(values)
    for i, (model, by_group) in enumerate(values.items()):
        for j, group in enumerate(groups):
            at = j + (i - (len(values) - 1) / 2) * width
            dots = by_group[group]
            spread = np.linspace(-0.25, 0.25, len(dots)) * width if len(dots) > 1 else [0.0]
            colour = COLOURS[i % len(COLOURS)]
            axes.scatter(at + np.asarray(spread), dots, color=colour, s=22, alpha=0.8, label=model if j == 0 else None)
            axes.hlines(float(np.mean(dots)), at - 0.4 * width, at + 0.4 * width, color=colour, linewidth=2)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(label)
    axes.set_ylim(*limits)
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set_title(title, fontsize=10)
    for text in axes.legend(frameon=False, fontsize=8).get_texts():
        text.set_parse_math(False)
    return _save(figure, path)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install 'rose_ds[analysis]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, stem: Path) -> list[Path]:
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    _pyplot().close(figure)
    return paths


def _turning(surfaces: Mapping[str, np.ndarray], steps: Sequence[float], low: float, high: float, folder: Path) -> Path:
    """One file, which needs no network: plotly's own script is in it."""
    try:
        from plotly import graph_objects
        from plotly.subplots import make_subplots
    except ImportError as error:
        raise ValueError("the page needs plotly: pip install 'rose_ds[analysis]'") from error
    names = [name.replace("<", "&lt;") for name in surfaces]
    figure = make_subplots(
        rows=1, cols=len(surfaces), specs=[[{"type": "surface"}] * len(surfaces)], subplot_titles=names
    )
    for column, loss in enumerate(surfaces.values(), start=1):
        figure.add_trace(
            graph_objects.Surface(
                x=list(steps),
                y=list(steps),
                z=np.clip(loss, low, high).T,
                cmin=low,
                cmax=high,
                colorscale="Cividis",
                showscale=column == len(surfaces),
                hovertemplate="%{x:.3f}, %{y:.3f}: loss %{z:.4f}<extra></extra>",
            ),
            row=1,
            col=column,
        )
    figure.update_layout(title_text="Loss around each model (Eq. 6), on one scale", margin={"l": 0, "r": 0, "b": 0})
    path = folder / "landscape.html"
    figure.write_html(path, include_plotlyjs=True)
    return path
