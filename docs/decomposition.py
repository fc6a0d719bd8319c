"""Draws docs/images/decomposition.png: a 3×3 convolution as 1×1 convolutions, shifts and a sum.

    python docs/decomposition.py [file.png]

Every panel is computed by functions of the library. The script also prints the largest difference
between the sum and a convolution of torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from translution.functional import convolution_by_shifts, shift_and_sum
from translution.utils.files import write_whole

KERNEL = torch.tensor([[-2.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])  # embosses


def draw(file: Path) -> float:
    """Draw the figure, and return the largest difference between the sum and conv2d."""
    digit = torch.tensor(load_digits().images[0], dtype=torch.float32) / 16
    image = F.pad(F.interpolate(digit[None, None], scale_factor=2), (2, 2, 2, 2))
    weight = KERNEL[None, None]
    maps = KERNEL.flatten()[:, None, None] * image  # [1, 9, height, width]: nine 1×1 convolutions
    alone = torch.eye(9)[:, :, None, None, None] * maps[:, :, None]  # [9, 9 taps, 1, ...]
    shifted = shift_and_sum(alone, 3)[:, 0]  # shift one map at a time
    total = convolution_by_shifts(image, weight, padding=1)
    direct = F.conv2d(image, weight, padding=1)

    figure = plt.figure(figsize=(12, 3.6), dpi=110)
    columns = figure.add_gridspec(1, 4, width_ratios=[1, 1.35, 1.35, 1], wspace=0.18)
    limit = float(direct.abs().max())
    look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}

    def one(cell, data, title):  # type: ignore[no-untyped-def]
        axes = figure.add_subplot(cell)
        axes.imshow(data.numpy(), **look)
        axes.set_title(title, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])

    def nine(cell, stack, title, arrows):  # type: ignore[no-untyped-def]
        grid = cell.subgridspec(3, 3, wspace=0.06, hspace=0.06)
        for tap in range(9):
            axes = figure.add_subplot(grid[tap])
            axes.imshow(stack[tap].numpy(), **(look | {"vmin": -2, "vmax": 2}))
            axes.set_xticks([])
            axes.set_yticks([])
            row, column = divmod(tap, 3)
            name = f"×{KERNEL[row, column]:g}"
            if arrows:  # each map moves in the direction opposite to the offset of its tap
                name = "↘↓↙→·←↗↑↖"[tap]
            axes.text(
                0.04, 0.96, name, transform=axes.transAxes, va="top", fontsize=9,
                bbox={"facecolor": "white", "alpha": 0.8, "pad": 1, "edgecolor": "none"},
            )  # fmt: skip
            if tap == 1:
                axes.set_title(title, fontsize=10)

    one(columns[0], image[0, 0], "the image")
    nine(columns[1], maps[0], "1. a 1×1 convolution for each tap", False)
    nine(columns[2], shifted, "2. each map shifted by its tap", True)
    one(columns[3], total[0, 0], "3. their sum: the convolution")
    write_whole(file, lambda path: figure.savefig(path, format="png", bbox_inches="tight"))
    plt.close(figure)
    return float((total - direct).abs().max())


if __name__ == "__main__":
    here = Path(__file__).parent / "images" / "decomposition.png"
    print("largest difference from conv2d:", draw(Path(sys.argv[1]) if sys.argv[1:] else here))
