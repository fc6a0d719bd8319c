"""The figures of experiments, and the style that all figures of results share."""

from __future__ import annotations

import html
import io
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ...utils.words import MIXER_TITLES
from .config import MEASURES
from .results import Cell, Column, Results

__all__ = [
    "COLOURS",
    "INK",
    "STYLE",
    "colours_of",
    "draw",
    "draw_costs",
    "legend",
    "line",
    "panels",
    "svg",
]

# Readable on white and on near-black; most colour-blind readers can distinguish them.
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
ACROSS = 3  # the largest number of panels side by side

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


# -- style -----------------------------------------------------------------------------------------


def colours_of(rows: Sequence[str]) -> dict[str, str]:
    """Choose a colour for each row; a row that is named like a mixer gets the mixer's colour."""
    own = {MIXER_TITLES[name]: colour for name, colour in COLOURS.items()}
    free = iter([colour for row, colour in own.items() if row not in rows])
    return {row: own.get(row) or next(free, "#8a8a8a") for row in rows}


def panels(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Figure, Any]:
    """Make a figure with a grid of panels.

    Args:
        rows: the number of panels one below the other.
        columns: the number of panels side by side.
        size: the width and height in inches.
        shared: which axes the panels share, as for `Figure.subplots`.

    Returns:
        The figure, and its axes [rows, columns].
    """
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def line(
    axis: Any, name: str, colour: str, x: Sequence[float], runs: Sequence[Sequence[float]],
    marked: bool = False,
) -> None:  # fmt: skip
    """Draw the mean of several runs over x, and a band of one standard deviation.

    Args:
        axis: the axes to draw on.
        name: the name of the line in the legend.
        colour: the colour of the line.
        x: the positions.
        runs: the values of each run, [runs, positions].
        marked: whether each position has a marker.
    """
    columns = list(zip(*runs, strict=True))
    means = [statistics.fmean(c) for c in columns]
    apart = [statistics.stdev(c) if len(c) > 1 else 0.0 for c in columns]
    mark = {"marker": MARKS.get(colour, "o"), "markersize": 4} if marked else {}
    axis.plot(x, means, color=colour, label=name, linewidth=1.8, **mark)
    low = [m - s for m, s in zip(means, apart, strict=True)]
    high = [m + s for m, s in zip(means, apart, strict=True)]
    axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def legend(figure: Figure, *axes: Any) -> None:
    """Add one legend above the figure, which names each line of these axes once."""
    lines: dict[str, Any] = {}
    for axis in axes:
        for drawn, name in zip(*axis.get_legend_handles_labels(), strict=True):
            lines.setdefault(name, drawn)
    figure.legend(
        list(lines.values()), list(lines), loc="outside upper center", ncols=min(len(lines), 4)
    )


def svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure as SVG that can be part of an HTML page, and uses its fonts and text colour.

    Args:
        figure: the figure.
        name: the prefix of all ids, unique on the page.
        label: the description for screen readers.
    """
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


# -- the figure of an experiment -------------------------------------------------------------------


def draw(results: Results, path: Path) -> None:
    """Draw the figure of an experiment: a panel for each main column, and a point for each seed.

    Args:
        results: the results of the experiment; the first measure is drawn.
        path: the PNG file to write.
    """
    e = results.experiment
    columns = [c for c in results.main_columns() if c.measure is MEASURES[e.measures[0]]]
    several = any(c.budget != "steps" for c in columns)
    across = min(ACROSS, max(1, len(columns)))
    down = max(1, math.ceil(len(columns) / across))
    height = 1.1 + 0.34 * len(results.rows) if e.axis is None else 3.2
    size = 2.2 + 3.0 * across, height * down
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = panels(down, across, size, sharey=True, sharex=e.axis is None)
        free = iter(axes.flat)
        for column, panel in zip(columns, free, strict=False):
            (_over if e.axis else _beside)(panel, results, column)
            panel.set_title(column.title(several))
        for panel in free:
            panel.set_axis_off()
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=110, format="png", facecolor="white")


def draw_costs(results: Results, path: Path | BinaryIO) -> bool:
    """Draw the first measure over the cost of the training: its time, and its multiply-adds.

    A step line joins the best rows: every other row costs more, or is worse. Rows that were trained
    for longer, in the comparison of equal time or as rows of their own, are points of their own.

    Args:
        results: the results of the experiment.
        path: the PNG file to write, or a buffer.

    Returns:
        Whether there was something to draw: at least two rows with different costs.
    """
    e, facts = results.experiment, results.facts["rows"]
    first = results.columns()[0]
    columns = [
        column
        for column in results.columns()
        if column.budget != "parameters" and results.is_last_trained(column)
    ]
    names = {"step_ms": "time of the training, × that of the first row"}
    if all("multiply_adds" in facts[row] for row in results.rows):
        names["multiply_adds"] = "multiply-adds of the training, × those of the first row"
    points = [
        (row, column.budget, cell)
        for column in columns
        for row in results.rows
        if (cell := results.at(column, row)) is not None
        and (column.budget == "steps" or row != getattr(e, column.budget).like)
    ]
    if len(points) < 2 or e.axis is not None:
        return False
    points.sort(key=lambda point: point[2].steps * facts[point[0]]["step_ms"])
    drawn = {row for row, _, _ in points}
    first_row = next(row for row in results.rows if row in drawn)
    steps = min(cell.steps for row, _, cell in points if row == first_row)
    unit = {fact: facts[first_row][fact] * steps for fact in names}
    with matplotlib.rc_context(STYLE):
        size = 4.6 * len(names) + 3.2, max(4.2, 0.6 + 0.17 * len(points))
        figure, axes = panels(1, len(names) + 1, size, width_ratios=[4.6] * len(names) + [3.2])
        for panel, (fact, title) in zip(axes.flat, names.items(), strict=False):
            costs = [cell.steps * facts[row][fact] / unit[fact] for row, _, cell in points]
            _over_costs(panel, costs, [cell for _, _, cell in points], first.measure.higher)
            panel.set_xlabel(title)
            panel.set_ylabel(first.measure.title)
            panel.sharey(axes.flat[0])
        texts = [
            f"{i}  {row}" + f", {cell.steps:,} steps" * (budget != "steps")
            for i, (row, budget, cell) in enumerate(points, 1)
        ]
        axes.flat[-1].set_axis_off()
        axes.flat[-1].text(0, 1, "\n".join(texts), va="top", fontsize=8, linespacing=1.35)
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=110, format="png", facecolor="white")
    return True


def _over_costs(panel: Axes, costs: Sequence[float], cells: Sequence[Cell], higher: bool) -> None:
    """Draw numbered points, and the line of the best for each cost."""
    best: list[tuple[float, float]] = []
    for cost, cell in sorted(zip(costs, cells, strict=True), key=lambda pair: pair[0]):
        if not best or (cell.mean > best[-1][1]) == higher:
            best.append((cost, cell.mean))
    places, heights = zip(*best, strict=True)
    panel.step([*places, max(costs)], [*heights, heights[-1]], where="post", color=SOFT, lw=1)
    for i, (cost, cell) in enumerate(zip(costs, cells, strict=True), 1):
        colour = ACCENT if (cost, cell.mean) in best else SOFT
        panel.errorbar(cost, cell.mean, cell.std or 0.0, fmt="o", ms=4, lw=1, color=colour)
        panel.annotate(
            str(i), (cost, cell.mean), xytext=(3, 2), textcoords="offset points", fontsize=7,
            color=INK,
        )  # fmt: skip
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"×{x:g}"))
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _beside(panel: Axes, results: Results, column: Column) -> None:
    """Draw the rows one below the other."""
    rows = results.rows
    best = results.best(column)
    for place, row in enumerate(rows):
        cell = results.at(column, row)
        if cell is None:
            continue
        colour = ACCENT if row == best else SOFT
        panel.plot(cell.values, [place] * len(cell.values), "o", color=colour, alpha=0.55, ms=6)
        panel.plot([cell.mean] * 2, [place - 0.28, place + 0.28], color=colour, lw=2.2)
    panel.set_yticks(range(len(rows)), rows)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.xaxis.set_major_locator(MaxNLocator(5))
    panel.set_xlabel(column.measure.title)
    panel.tick_params(labelbottom=True)  # shared axes have numbers in the last row of panels only
    panel.grid(axis="x", color="#00000018")


def _over(panel: Axes, results: Results, column: Column) -> None:
    """Draw rows whose names begin with a number over that number, and the others as lines."""
    points, lines = [], []
    for row in results.rows:
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
        below = place == 0 < len(lines) - 1  # so that the names of two lines do not overlap
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
