"""Draws the figures of docs/idea.md into docs/images, from results of the library.

    python docs/figures.py [folder]

Here a class is an offset class: the number of a matrix in a table.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.patches import Rectangle
from sklearn.datasets import load_digits
from torch import Tensor

from translution import Layout, SelfAttention, Translution2d
from translution.functional import offset_mix
from translution.utils.files import write_whole

QUERY = "#e0663c"
ABSENT = "#ececec"
COLOURS = plt.get_cmap("turbo")


def colour(value: float) -> Any:
    """The colour for a value from 0 to 1, light enough for black letters on it."""
    return tuple(0.55 + 0.45 * x for x in COLOURS(0.05 + 0.9 * value)[:3])


def cells(axes: Any, index: Tensor, classes: int, size: float = 0.0) -> None:
    """Draw a matrix of offset classes, each with its own colour, and -1 in grey.

    Args:
        axes: the axes to draw on.
        index: the classes [rows, columns].
        classes: the number of classes, which the colours cover.
        size: the font size of the class numbers; 0 draws no numbers.
    """
    rows, columns = index.shape
    for i in range(rows):
        for j in range(columns):
            c = int(index[i, j])
            face = ABSENT if c < 0 else colour(c / max(classes - 1, 1))
            axes.add_patch(Rectangle((j, i), 1, 1, facecolor=face, edgecolor="white", lw=0.8))
            if size and c >= 0:
                axes.text(j + 0.5, i + 0.5, c, ha="center", va="center", fontsize=size)
    axes.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def frame(axes: Any, row: float, column: float, rows: int = 1, columns: int = 1) -> None:
    """Draw a frame around cells, from the given row and column on."""
    box = Rectangle((column, row), columns, rows, fill=False, edgecolor=QUERY, lw=2.5, zorder=3)
    box.set_clip_on(False)
    axes.add_patch(box)


def save(figure: Any, file: Path) -> None:
    write_whole(file, lambda to: figure.savefig(to, format="png", bbox_inches="tight"))
    plt.close(figure)


def classes(file: Path) -> None:
    """Draw, for two queries on a 4×4 grid, the class of each key and its place in the 7×7 table."""
    layout = Layout((4, 4))
    table = torch.arange(layout.classes).view(7, 7)
    figure, panels = plt.subplots(
        1, 4, figsize=(10.6, 3.3), dpi=140, width_ratios=[4, 7, 4, 7], layout="constrained"
    )
    pairs = ((panels[0], panels[1]), (panels[2], panels[3]))
    for (left, right), (row, column) in zip(pairs, [(0, 1), (2, 2)], strict=True):
        cells(left, layout.index[4 * row + column].view(4, 4), layout.classes, 9)
        frame(left, row, column)
        left.set_title(f"query at ({row}, {column}):\nclass of each key", fontsize=10)
        cells(right, table, layout.classes, 8)
        frame(right, row, column, 4, 4)
        right.set_title("the table, a matrix per offset;\nframed: this query's", fontsize=10)
        for axis, name in ((right.xaxis, "columns"), (right.yaxis, "rows")):
            axis.set_ticks(
                [i + 0.5 for i in range(7)], [f"{i:+d}" if i else "0" for i in range(-3, 4)]
            )
            axis.set_tick_params(length=0, labelsize=8)
            axis.set_label_text(f"offset in {name}, query − key", fontsize=8)
    save(figure, file)


def layouts(file: Path) -> None:
    """Draw `Layout.index` of nine tokens for each option, and of a grid with a class token."""
    shown = {
        "Layout(9)": Layout((9,)),
        "causal=True": Layout((9,), causal=True),
        "window=2": Layout((9,), window=(2,)),
        "causal=True, window=3": Layout((9,), causal=True, window=(3,)),
        "window=1, dilation=3": Layout((9,), window=(1,), dilation=(3,)),
        "buckets=3": Layout((9,), buckets=(3,)),
        "Layout((2, 4), prefix=1)": Layout((2, 4), prefix=1),
        "the same, prefix_queries=True": Layout((2, 4), prefix=1, prefix_queries=True),
    }
    figure, panels = plt.subplots(2, 4, figsize=(12, 7), dpi=120, layout="constrained")
    for axes, (name, layout) in zip(panels.flat, shown.items(), strict=True):
        cells(axes, layout.index, layout.classes, 8)
        axes.set_title(f"{name}\n{layout.classes} classes", fontsize=10)
        axes.set_xlabel("key", fontsize=8)
        axes.set_ylabel("query", fontsize=8)
        axes.set_anchor("N")
    save(figure, file)


def buckets(file: Path) -> None:
    """Draw the class of each offset of a causal layout, without buckets and with two sizes."""
    figure, axes = plt.subplots(figsize=(7.2, 3.4), dpi=120)
    length = 256
    for n, tone in ((None, "#7a869a"), (16, QUERY), (8, "#3d8fd1")):
        layout = Layout((length,), causal=True, buckets=None if n is None else (n,))
        last = layout.select(queries=[length - 1]).index[0].flip(0)
        name = "a class per offset" if n is None else f"buckets={n}"
        axes.step(range(length), last, where="post", color=tone, label=f"{name}: {layout.classes}")
    axes.set(xlabel="offset, query − key", ylabel="class", ylim=(0, 32))
    axes.set_xscale("symlog", linthresh=8, linscale=2, base=2)  # even steps up to 8
    ticks = [0, 2, 4, 6, 8, 16, 32, 64, 128, 255]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_xlim(0, length - 1)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, title="classes", title_fontsize=9)
    figure.tight_layout()
    save(figure, file)


@torch.no_grad()
def parents(file: Path) -> tuple[float, float]:
    """Draw attention and convolution beside Translution with the weights that make it equal.

    Returns:
        the largest difference from attention, and from the convolution.
    """
    torch.manual_seed(0)
    digit = torch.tensor(load_digits().images[3], dtype=torch.float32) / 16
    image = F.pad(F.interpolate(digit[None, None], scale_factor=2), (2, 2, 2, 2))
    size = image.shape[-1]

    # a layer whose tables have equal entries, and self-attention with that entry
    layer = Translution2d(9, (size, size), heads=1, init="equal")
    plain = SelfAttention(9, (size, size), heads=1)
    for name in ("q_proj", "k_proj"):
        entry = 8 * getattr(layer, name).weight.data[0]  # larger scores make the pattern visible
        getattr(layer, name).weight.data[:] = entry
        getattr(plain, name).weight.data[:] = entry.T
    tokens = F.unfold(image, 3, padding=1).transpose(1, 2)
    query = 7 * size + 12
    maps = [
        attend(tokens, return_weights=True)[1][0, 0, query].view(size, size)
        for attend in (layer, plain)
    ]

    # weights of one on a 3×3 window, and a table with a number per offset
    kernel = torch.tensor([[-2.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
    layout = Layout((size, size), window=(1, 1))
    ones = torch.ones(1, 1, layout.tokens, layout.tokens)
    table = kernel.flip(0, 1).view(9, 1, 1)  # offsets are query − key, and taps are key − query
    mixed = offset_mix(ones, image.flatten(2).transpose(1, 2), table, layout)[0].view(size, size)
    convolved = F.conv2d(image, kernel[None, None], padding=1)[0, 0]

    rows = [
        (("Translution, equal entries:\nattention of one patch", maps[0]),
         ("self-attention", maps[1]), "OrRd"),
        (("Translution, weights of one\non a 3×3 window", mixed),
         ("conv2d", convolved), "RdBu_r"),
    ]  # fmt: skip
    figure, panels = plt.subplots(2, 3, figsize=(8.4, 6.2), dpi=120)
    differences = []
    for axes, (ours, theirs, palette) in zip(panels, rows, strict=True):
        limit = float(theirs[1].abs().max())
        look = {"cmap": palette, "vmin": -limit if float(theirs[1].min()) < 0 else 0, "vmax": limit}
        differences.append(float((ours[1] - theirs[1]).abs().max()))
        axes[0].imshow(image[0, 0].numpy(), cmap="gray_r")
        axes[0].set_title("the image", fontsize=10)
        for one, (title, values) in zip(axes[1:], (ours, theirs), strict=True):
            one.imshow(values.detach().numpy(), **look)
            one.set_title(title, fontsize=10)
        for one in axes:
            one.set(xticks=[], yticks=[])
    row, column = divmod(query, size)
    frame(panels[0, 0], row - 0.5, column - 0.5)
    panels[0, 0].set_title("the image, and the query's patch", fontsize=10)
    figure.tight_layout(h_pad=2)
    save(figure, file)
    return differences[0], differences[1]


PICTURES = {
    "classes.png": classes,
    "layouts.png": layouts,
    "buckets.png": buckets,
    "parents.png": parents,
}


def main() -> None:
    folder = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "images"
    for name, draw in PICTURES.items():
        differences = draw(folder / name)
        print(name if differences is None else f"{name}: largest differences {differences}")


if __name__ == "__main__":
    main()
