"""The figure of an experiment: a point for every seed, not the mean alone."""

from __future__ import annotations

import math
import re
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .config import MEASURES
from .report import Column, Results

__all__ = ["draw"]

INK, ACCENT, SOFT = "#333333", "#e0663c", "#7a869a"
ACROSS = 3  # panels


def draw(results: Results, path: Path) -> None:
    """A panel for each column of the first measure; PNG."""
    e = results.experiment
    columns = [c for c in results.columns() if c.measure is MEASURES[e.measures[0]]]
    several = any(c.budget != "steps" for c in columns)
    across = min(ACROSS, max(1, len(columns)))
    down = max(1, math.ceil(len(columns) / across))
    height = 1.1 + 0.34 * len(e.rows) if e.axis is None else 3.2
    figure = Figure(
        figsize=(2.2 + 3.0 * across, height * down), layout="constrained", facecolor="white"
    )
    panels = figure.subplots(down, across, sharey=e.axis is None, squeeze=False)
    free = iter(panels.flat)
    for column, panel in zip(columns, free, strict=False):
        panel.spines[["top", "right"]].set_visible(False)
        (_over if e.axis else _beside)(panel, results, column)
        panel.set_title(column.title(several), fontsize=10)
    for panel in free:
        panel.set_axis_off()
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, format="png")


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
