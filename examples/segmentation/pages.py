"""Writes the report of a run, report.html, and its figures as PNG."""

from __future__ import annotations

import base64
import io
import statistics
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.patches import Patch
from scenes import CLASSES
from segmenter import load_segmenter
from torch import Tensor

from translution.apps.experiments.figures import STYLE, legend, line, panels, svg
from translution.utils.files import write_whole

__all__ = ["percent", "seconds", "spread", "write_report"]

# The colours of the classes: ten hues, and for the background a colour that is nearly black.
HUES = (
    "#e6194b", "#3cb44b", "#ffe119", "#4d7dff", "#f58231",
    "#b45ae0", "#46d9e8", "#f7a8d8", "#c0ef3f", "#b9855a", "#15181c",
)  # fmt: skip
# The colours of the backbones, in the order of the report.
COLOURS = ("#4f9d69", "#e0663c", "#3d8fd1", "#b07cc6", "#c2953a", "#7a869a")


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None below two values) and how many."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def percent(value: dict[str, Any]) -> str:
    """A `spread` of shares, in percent."""
    return seconds({name: value[name] and 100 * value[name] for name in ("mean", "std")})


def seconds(value: dict[str, Any]) -> str:
    """A `spread`, with one decimal."""
    if value["mean"] is None:
        return "–"
    return f"{value['mean']:.1f}" + ("" if value["std"] is None else f" ± {value['std']:.1f}")


def write_report(folder: Path, results: dict[str, Any], images: Tensor, classes: Tensor) -> None:
    """Write report.html, predictions.png and iou.png.

    Args:
        folder: the output folder, which contains the weights of the runs.
        results: the content of results.json.
        images, classes: the test scenes, of which the first are shown with the predictions of each
            backbone's first seed.
    """
    colours = {
        row["backbone"]: COLOURS[i % len(COLOURS)] for i, row in enumerate(results["summary"])
    }
    shown = results["options"]["pictures"]
    columns = _columns(folder, results["runs"], images[:shown], classes[:shown])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "seconds": seconds}
    page = environment.get_template("report.html.jinja").render(
        results=results,
        options=results["options"],
        colours=colours,
        hues=dict(zip(CLASSES, HUES, strict=True)),
        pictures=[(title, [_data_uri(p) for p in column]) for title, column in columns],
        bars=svg(_bars(results["summary"], colours), "bars", "IoU per class, for each backbone")
        if results["runs"]
        else "",
        curves=svg(_curves(results["runs"], colours), "curves", "Loss and validation IoU by step")
        if results["runs"]
        else "",
    )
    write_whole(folder / "report.html", lambda to: to.write_text(page, "utf-8"))
    if results["runs"]:
        _write_png(folder / "predictions.png", _sheet(columns))
        _write_png(folder / "iou.png", _bars(results["summary"], colours))


def _columns(
    folder: Path, runs: list[dict[str, Any]], images: Tensor, classes: Tensor
) -> list[tuple[str, list[np.ndarray]]]:
    """Title and pictures [height, width, 3] of each column: image, truth and predictions."""
    grey = images[:, 0, :, :, None].expand(-1, -1, -1, 3).numpy()
    columns = [("image", list(grey)), ("truth", list(_coloured(classes)))]
    shown = set()
    for run in runs:
        if run["backbone"] not in shown:
            shown.add(run["backbone"])
            model = load_segmenter(folder / run["weights"])
            with torch.inference_mode():
                columns.append((run["backbone"], list(_coloured(model(images).argmax(1)))))
    return columns


def _coloured(classes: Tensor) -> np.ndarray:
    return np.array([to_rgb(hue) for hue in HUES])[classes.numpy()]


def _data_uri(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    imsave(buffer, picture, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _write_png(path: Path, figure: Figure) -> None:
    FigureCanvasAgg(figure)
    write_whole(path, lambda to: figure.savefig(to, format="png", dpi=110, facecolor="white"))


def _sheet(columns: list[tuple[str, list[np.ndarray]]]) -> Figure:
    """A figure with a column for each scene, and a row for image, truth and each prediction."""
    many = len(columns[0][1])
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 10}):
        figure = Figure(figsize=(1.45 * many + 0.3, 1.45 * len(columns) + 0.5))
        figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
        axes = figure.subplots(len(columns), many, squeeze=False)
        for row, (title, pictures) in zip(axes, columns, strict=True):
            row[0].set_ylabel(title)
            for axis, picture in zip(row, pictures, strict=True):
                axis.imshow(picture, interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                axis.spines[:].set_visible(False)
        patches = [Patch(color=hue, label=name) for hue, name in zip(HUES, CLASSES, strict=True)]
        figure.legend(
            handles=patches, loc="outside lower center", ncols=len(HUES), frameon=False,
            handlelength=0.9, handletextpad=0.4, columnspacing=1.0,
        )  # fmt: skip
    return figure


def _bars(summary: list[dict[str, Any]], colours: dict[str, str]) -> Figure:
    """A bar chart of the IoU per class and backbone, with the deviation over the seeds."""
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "y"}):
        figure, axes = panels(1, 1, (9, 3.4))
        axis = axes[0][0]
        axis.set_axisbelow(True)
        wide = 0.8 / len(summary)
        for i, row in enumerate(summary):
            x = [k + (i - (len(summary) - 1) / 2) * wide for k in range(len(row["iou"]))]
            axis.bar(
                x, [100 * value["mean"] for value in row["iou"]], 0.92 * wide,
                yerr=[100 * (value["std"] or 0) for value in row["iou"]],
                color=colours[row["backbone"]], label=row["backbone"],
                error_kw={"ecolor": "#888888", "elinewidth": 1.2},
            )  # fmt: skip
        axis.set_xticks(range(len(CLASSES)), CLASSES)
        axis.tick_params(axis="x", length=0)
        axis.set_ylim(0, 100)
        axis.set_ylabel("IoU, %")
        legend(figure, axis)
    return figure


def _curves(runs: list[dict[str, Any]], colours: dict[str, str]) -> Figure:
    """The curves of the training loss and the validation IoU over the steps."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(1, 2, (9, 3.2))
        pairs = (("loss", "training loss", 1), ("iou", "validation mean IoU, %", 100))
        for axis, (key, title, scale) in zip(axes[0], pairs, strict=True):
            for name, colour in colours.items():
                mine = [run["curve"] for run in runs if run["backbone"] == name]
                x = [point["step"] for point in mine[0]]
                line(axis, name, colour, x, [[scale * p[key] for p in c] for c in mine])
            axis.set_ylim(bottom=0, top=100 if key == "iou" else None)
            axis.set_ylabel(title)
            axis.set_xlabel("step")
        legend(figure, axes[0][0])
    return figure
