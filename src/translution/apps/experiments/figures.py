"""The figures of experiments, and the look that all figures of results share."""

from __future__ import annotations

import html
import io
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...utils.words import MIXER_TITLES
from .config import MEASURES
from .results import Column, Results

__all__ = ["COLOURS", "INK", "STYLE", "colours_of", "draw", "legend", "line", "panels", "svg"]

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
MARKS = dict(zip(COLOURS.values(), "osD^PvX", strict=True))
INK, ACCENT, SOFT = "#010203", COLOURS["translution"], COLOURS["attention"]
ACROSS = 3  # panels

STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#88888855",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


# -- the look --------------------------------------------------------------------------------------


def colours_of(rows: Sequence[str]) -> dict[str, str]:
    """A colour for each row: that of a mixer where the row is called by its title."""
    own = {MIXER_TITLES[name]: colour for name, colour in COLOURS.items()}
    free = iter([colour for row, colour in own.items() if row not in rows])
    return {row: own.get(row) or next(free, "#8a8a8a") for row in rows}


def panels(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Figure, Any]:
    """A figure of this size in inches, and its axes [rows, columns]."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def line(
    axis: Any, name: str, colour: str, x: Sequence[float], runs: Sequence[Sequence[float]],
    marked: bool = False,
) -> None:  # fmt: skip
    """The mean of several runs at each x, and a band of one standard deviation."""
    columns = list(zip(*runs, strict=True))
    means = [statistics.fmean(c) for c in columns]
    apart = [statistics.stdev(c) if len(c) > 1 else 0.0 for c in columns]
    mark = {"marker": MARKS.get(colour, "o"), "markersize": 4} if marked else {}
    axis.plot(x, means, color=colour, label=name, linewidth=1.8, **mark)
    low = [m - s for m, s in zip(means, apart, strict=True)]
    high = [m + s for m, s in zip(means, apart, strict=True)]
    axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def legend(figure: Figure, *axes: Any) -> None:
    """One legend above, with each line of these axes once."""
    lines: dict[str, Any] = {}
    for axis in axes:
        for drawn, name in zip(*axis.get_legend_handles_labels(), strict=True):
            lines.setdefault(name, drawn)
    figure.legend(
        list(lines.values()), list(lines), loc="outside upper center", ncols=min(len(lines), 4)
    )


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
    text = text.replace(INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


# -- an experiment's figure ------------------------------------------------------------------------


def draw(results: Results, path: Path) -> None:
    """A panel for each column of the first measure, a point for each seed; PNG."""
    e = results.experiment
    columns = [c for c in results.columns() if c.measure is MEASURES[e.measures[0]]]
    several = any(c.budget != "steps" for c in columns)
    across = min(ACROSS, max(1, len(columns)))
    down = max(1, math.ceil(len(columns) / across))
    height = 1.1 + 0.34 * len(e.rows) if e.axis is None else 3.2
    size = 2.2 + 3.0 * across, height * down
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = panels(down, across, size, sharey=e.axis is None)
        free = iter(axes.flat)
        for column, panel in zip(columns, free, strict=False):
            (_over if e.axis else _beside)(panel, results, column)
            panel.set_title(column.title(several))
        for panel in free:
            panel.set_axis_off()
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=110, format="png", facecolor="white")


def _beside(panel: Axes, results: Results, column: Column) -> None:
    """Rows one below the other."""
    rows = list(results.experiment.rows)
    best = results.best(column)
    for place, row in enumerate(rows):
        cell = results.at(column, row)
        if cell is None:
            continue
        colour = ACCENT if row in best else SOFT
        panel.plot(cell.values, [place] * len(cell.values), "o", color=colour, alpha=0.55, ms=6)
        panel.plot([cell.mean] * 2, [place - 0.28, place + 0.28], color=colour, lw=2.2)
    panel.set_yticks(range(len(rows)), rows)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.xaxis.set_major_locator(MaxNLocator(5))
    panel.set_xlabel(column.measure.title)
    panel.grid(axis="x", color="#00000018")


def _over(panel: Axes, results: Results, column: Column) -> None:
    """Rows whose name begins with a number over it; the others as lines across."""
    points, lines = [], []
    for row in results.experiment.rows:
        cell = results.at(column, row)
        if cell is None:
            continue
        number = re.match(r"\d+", row)
        if number:
            points.append((int(number[0]), cell))
        else:
            lines.append((cell.mean, cell.std or 0.0, row))
    for place, (mean, std, row) in enumerate(sorted(lines)):
        panel.axhline(mean, color=SOFT, ls="--", lw=1.2)
        panel.axhspan(mean - std, mean + std, color=SOFT, alpha=0.12, lw=0)
        below = place == 0 < len(lines) - 1  # so that the names of two don't collide
        panel.annotate(
            row, (1.0, mean), xycoords=("axes fraction", "data"), ha="right",
            va="top" if below else "bottom", fontsize=8, color=INK,
        )  # fmt: skip
    points.sort(key=lambda point: point[0])
    places = range(len(points))
    panel.plot(places, [cell.mean for _, cell in points], color=ACCENT, lw=2)
    for place, (_, cell) in zip(places, points, strict=True):
        panel.plot([place] * len(cell.values), cell.values, "o", color=ACCENT, alpha=0.55, ms=6)
    panel.set_xticks(list(places), [str(number) for number, _ in points])
    panel.set_xlabel(results.experiment.axis or "")
    panel.set_ylabel(column.measure.title)
    panel.grid(axis="y", color="#00000018")
