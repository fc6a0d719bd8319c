"""The figures of the report, as SVG that takes the page's text colour."""

from __future__ import annotations

import html
import io
import math
import re
import statistics
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "STYLE",
    "curves",
    "distances",
    "legend",
    "mean_band",
    "norms",
    "panels",
    "svg",
]

# Readable on white and on near-black, and told apart by most colour-blind readers.
COLOURS = {
    "attention": "#7a869a",
    "rotary": "#b07cc6",
    "bias": "#c2953a",
    "convolution": "#4f9d69",
    "acmix": "#d0558f",
    "translution": "#e0663c",
    "alpha": "#3d8fd1",
}
MARKS = dict(zip(COLOURS, "osD^PvX", strict=True))
_TEXT = "#010203"  # stands for currentColor

STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _TEXT,
    "axes.titlesize": 10,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#88888855",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


def svg(figure: Figure, name: str, label: str) -> str:
    """Inline SVG: ids of its own, a label, no links, the page's fonts and colour."""
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    nothing = dict.fromkeys(["Date", "Creator", "Format", "Type"])
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    text = text.replace(_TEXT, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def mean_band(rows: list[list[float]]) -> tuple[list[float], list[float]]:
    columns = list(zip(*rows, strict=True))
    means = [statistics.fmean(c) for c in columns]
    return means, [statistics.stdev(c) if len(c) > 1 else 0.0 for c in columns]


def _line(axis: Any, mixer: str, x: list[float], rows: list[list[float]], **more: Any) -> None:
    means, apart = mean_band(rows)
    colour = COLOURS.get(mixer, "#8a8a8a")
    axis.plot(x, means, color=colour, label=mixer, linewidth=1.8, **more)
    low = [m - s for m, s in zip(means, apart, strict=True)]
    high = [m + s for m, s in zip(means, apart, strict=True)]
    axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def _of(runs: list[dict[str, Any]], mixer: str, regime: str) -> list[dict[str, Any]]:
    return [run for run in runs if run["mixer"] == mixer and run["regime"] == regime]


def _mixers(runs: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(run["mixer"] for run in runs))


def panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def legend(figure: Figure, *axes: Any) -> None:
    lines: dict[str, Any] = {}
    for axis in axes:
        for line, name in zip(*axis.get_legend_handles_labels(), strict=True):
            lines.setdefault(name, line)
    handles, names = list(lines.values()), list(lines)
    figure.legend(handles, names, loc="outside upper center", ncols=len(lines))


def curves(runs: list[dict[str, Any]]) -> str:
    """Loss and accuracy on the training batches, by step."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(2, 2, (9, 5.4))
        for column, regime in enumerate(("centred", "moved")):
            for row, (key, title) in enumerate((("loss", "loss"), ("accuracy", "accuracy, %"))):
                axis = axes[row][column]
                for mixer in _mixers(runs):
                    mine = [run["curve"] for run in _of(runs, mixer, regime)]
                    if mine:
                        scale = 100 if key == "accuracy" else 1
                        x = [point["step"] for point in mine[0]]
                        _line(axis, mixer, x, [[scale * p[key] for p in c] for c in mine])
                axis.set_ylabel(title if column == 0 else "")
                axis.set_ylim(bottom=0, top=100 if key == "accuracy" else None)
                if row == 0:
                    axis.set_title(f"trained on {regime} digits")
                else:
                    axis.set_xlabel("step")
        legend(figure, axes[0][0])
        return svg(figure, "curves", "Training loss and accuracy by step, for each mixer")


def distances(runs: list[dict[str, Any]]) -> str:
    """Accuracy on held-out digits by how far they were moved."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(1, 2, (9, 3.6))
        for column, regime in enumerate(("centred", "moved")):
            axis = axes[0][column]
            for mixer in _mixers(runs):
                mine = [run["by_distance"] for run in _of(runs, mixer, regime)]
                if mine:
                    x = [(ring["from"] + ring["to"]) / 2 for ring in mine[0]]
                    rows = [[100 * ring["accuracy"] for ring in r] for r in mine]
                    _line(axis, mixer, x, rows, marker=MARKS.get(mixer, "o"), markersize=4)
            axis.axhline(10, color=_TEXT, linewidth=0.8, linestyle=":")
            axis.set_title(f"trained on {regime} digits")
            axis.set_xlabel("distance moved, pixels")
            axis.set_ylim(0, 100)
            axis.set_ylabel("accuracy, %" if column == 0 else "")
        legend(figure, axes[0][0], axes[0][1])
        return svg(figure, "distances", "Test accuracy by the distance moved, for each mixer")


def norms(tables: list[dict[str, Any]], name: str, label: str) -> str:
    """Per block and table, the norm of each entry over its offset, and of its own part."""
    count = len(tables)
    columns = min(3, count)
    rows = math.ceil(count / columns)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = panels(2 * rows, columns, (2.9 * columns, 4.9 * rows))
        for axis in axes.flat:
            axis.set_visible(False)
        for i, table in enumerate(tables):
            for k, (key, what) in enumerate((("norm", "norm"), ("apart", "norm of its own part"))):
                axis = axes[2 * (i // columns) + k][i % columns]
                axis.set_visible(True)
                values = table[key].numpy()
                down, right = values.shape[0] // 2, values.shape[1] // 2
                image = axis.imshow(
                    values, cmap="viridis", interpolation="none",
                    extent=(-right - 0.5, right + 0.5, down + 0.5, -down - 0.5),
                )  # fmt: skip
                axis.set_title(f"layer {table['block'] + 1}, {table['table']}: {what}", fontsize=9)
                axis.spines[:].set_visible(False)
                axis.tick_params(labelsize=8)
                bar = figure.colorbar(image, ax=axis, shrink=0.85)
                bar.outline.set_visible(False)
                bar.ax.tick_params(labelsize=8)
        return svg(figure, name, label)
