"""The figures of the report, as SVG in the text colour of the page."""

from __future__ import annotations

import math
from typing import Any

import matplotlib

from ..experiments.figures import INK, STYLE, colours_of, legend, line, panels, svg

__all__ = ["curves", "distances", "norms"]

Lines = dict[tuple[str, str], list[Any]]
"""What is drawn for each row and regime: a list for each run."""


def curves(found: Lines) -> str:
    """Draw the loss and the accuracy on training batches over the steps.

    Args:
        found: for each run the rows of its metrics.csv.

    Returns:
        The figure as SVG.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(2, 2, (9, 5.4))
        colours = colours_of(list(dict.fromkeys(row for row, _ in found)))
        for (row, regime), runs in found.items():
            column = _column(regime)
            for axis, key, scale in (
                (axes[0][column], "train_loss", 1.0), (axes[1][column], "train_accuracy", 100.0),
            ):  # fmt: skip
                x = [point["step"] for point in runs[0]]
                line(axis, row, colours[row], x, [[scale * p[key] for p in run] for run in runs])
        for column, regime in enumerate(("centred", "moved")):
            axes[0][column].set_title(f"trained on {regime} digits")
            axes[0][column].set_ylim(bottom=0)
            axes[1][column].set_ylim(0, 100)
            axes[1][column].set_xlabel("step")
        axes[0][0].set_ylabel("loss")
        axes[1][0].set_ylabel("accuracy, %")
        legend(figure, *axes[0])
        return svg(figure, "curves", "Training loss and accuracy by step, for each mixer")


def distances(found: Lines) -> str:
    """Draw the accuracy on test digits over the distance that they were moved.

    Args:
        found: for each run the rings of `accuracy_by_distance`.

    Returns:
        The figure as SVG.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(1, 2, (9, 3.6))
        colours = colours_of(list(dict.fromkeys(row for row, _ in found)))
        for (row, regime), runs in found.items():
            x = [(ring["from"] + ring["to"]) / 2 for ring in runs[0]]
            accuracies = [[100 * ring["accuracy"] for ring in run] for run in runs]
            line(axes[0][_column(regime)], row, colours[row], x, accuracies, marked=True)
        for column, regime in enumerate(("centred", "moved")):
            axis = axes[0][column]
            axis.axhline(10, color=INK, linewidth=0.8, linestyle=":")
            axis.set_title(f"trained on {regime} digits")
            axis.set_xlabel("distance moved, pixels")
            axis.set_ylim(0, 100)
        axes[0][0].set_ylabel("accuracy, %")
        legend(figure, *axes[0])
        return svg(figure, "distances", "Test accuracy by the distance moved, for each mixer")


def _column(regime: str) -> int:
    return ("centred", "moved").index(regime)


def norms(tables: list[dict[str, Any]], name: str, label: str) -> str:
    """Draw, for each block and table, the norm of each matrix over its offset.

    Below it is the norm of the difference between each matrix and the mean of its table.

    Args:
        tables: the tables, as `table_norms` returns them.
        name: the prefix of all ids in the SVG.
        label: the description for screen readers.

    Returns:
        The figure as SVG.
    """
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
