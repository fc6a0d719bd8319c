"""RandAugment for whole batches: random operations with torchvision's formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ..config import Options

__all__ = ["RandAugmentOptions", "rand_augment"]

LEVELS = 30  # the largest magnitude
OPERATIONS = 100  # the most that are applied to an image
SHIFT = 150 / 331  # the largest shift as a share of the image's side

Operation = Callable[[Tensor, Tensor], Tensor]


class RandAugmentOptions(Options):
    """RandAugment: random operations on each image. `[n, m]` stands for n operations at magnitude
    m, with torchvision's defaults for everything else.

    operations: how many operations are drawn for each image, and applied one after the other.
    magnitude: their strength, from 0 to 30.
    magnitude_std: the deviation of the normal distribution around `magnitude` that the strength of
        each operation is drawn from. Draws below 0 and above 30 become 0 and 30.
    probability: the probability with which an operation that was drawn is applied.
    increasing: whether every operation changes more at a larger magnitude. If not, saturation,
        contrast, brightness and sharpness go from 0.1 to 1.9 times their value, and posterizing and
        solarizing change less.
    interpolation: how a rotated, sheared or shifted image is sampled.
    fill: the colour of what it leaves uncovered, "black" or the "mean" of the data.
    """

    operations: int = Field(ge=1, le=OPERATIONS)
    magnitude: float = Field(ge=0, le=LEVELS)
    magnitude_std: float = Field(0.0, ge=0, le=LEVELS)
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    increasing: bool = True
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "nearest"
    fill: Literal["black", "mean"] = "black"

    @model_validator(mode="before")
    @classmethod
    def _read_pair(cls, given: Any) -> Any:
        """Read the short form [n, m]."""
        if not isinstance(given, list | tuple):
            return given
        if (
            len(given) != 2
            or not all(isinstance(value, int | float) for value in given)
            or not 1 <= given[0] <= OPERATIONS
            or not 0 <= given[1] <= LEVELS
        ):
            raise ValueError(
                f"got {list(given)}, want [n, m] with n from 1 to {OPERATIONS} and m from 0 to "
                f"{LEVELS} (null switches it off)"
            )
        return {"operations": given[0], "magnitude": given[1]}


def rand_augment(pixels: Tensor, options: RandAugmentOptions, mean: Tensor) -> Tensor:
    """Apply random operations to each image.

    Args:
        pixels: [images, channels, height, width] with values from 0 to 1.
        options: which operations, and how strong they are.
        mean: [channels, 1, 1], the mean of the data.

    Returns:
        The changed images. The operations, their signs and strengths come from torch's global
        generator on the CPU.
    """
    pixels, images = pixels.clone(), len(pixels)
    operations = make_operations(options, mean)
    for _ in range(options.operations):
        drawn = torch.randint(len(operations), (images,))
        level = torch.full((images,), options.magnitude / LEVELS)
        sign = torch.randint(2, (images,)) * 2 - 1
        if options.magnitude_std:
            level += torch.randn(images) * options.magnitude_std / LEVELS
        level = level.clamp(0, 1) * sign
        if options.probability < 1:
            drawn[torch.rand(images) >= options.probability] = -1
        for i, operation in enumerate(operations):
            indices = (drawn == i).nonzero()[:, 0]
            if len(indices):
                here = indices.to(pixels.device)
                changed = operation(pixels[here], level[indices].to(pixels.device))
                pixels[here] = changed.clamp(0, 1)
    return pixels


def make_operations(options: RandAugmentOptions, mean: Tensor) -> list[Operation]:
    """RandAugment's fourteen operations. Each takes images [images, channels, height, width] with
    values from 0 to 1, and levels [images] from -1 to 1."""
    from kornia import enhance

    fill = mean if options.fill == "mean" else torch.zeros_like(mean)

    def warp(x: Tensor, rows: Sequence[Sequence[Tensor | float]]) -> Tensor:
        return _warp(x - fill, rows, options.interpolation) + fill

    def size(x: Tensor) -> tuple[int, int]:
        return x.shape[-2], x.shape[-1]

    def rotate(x: Tensor, s: Tensor) -> Tensor:
        cos, sin = (s * math.pi / 6).cos(), (s * math.pi / 6).sin()
        return warp(x, [[cos, -sin, 0.0], [sin, cos, 0.0]])

    def shear(x: Tensor, s: Tensor, axis: int) -> Tensor:
        # the first row or column stays in its place, and not the middle one
        h, w = size(x)
        if axis:
            return warp(x, [[1.0, 0.3 * s, 0.3 * s * h / 2], [0.0, 1.0, 0.0]])
        return warp(x, [[1.0, 0.0, 0.0], [0.3 * s, 1.0, 0.3 * s * w / 2]])

    def shift(x: Tensor, s: Tensor, axis: int) -> Tensor:
        by = (SHIFT * size(x)[axis] * s).trunc()  # whole pixels
        return warp(x, [[1.0, 0.0, -by * axis], [0.0, 1.0, -by * (1 - axis)]])

    def factor(s: Tensor) -> Tensor:
        return 1 + 0.9 * s if options.increasing else 0.1 + 1.8 * s.abs()

    def strength(s: Tensor) -> Tensor:
        strength = s.abs() if options.increasing else 1 - s.abs()
        return strength[:, None, None, None]

    def saturation(x: Tensor, s: Tensor) -> Tensor:
        if x.shape[1] != 3:
            return x
        return enhance.adjust_saturation_with_gray_subtraction(x, factor(s))

    def autocontrast(x: Tensor, s: Tensor) -> Tensor:
        low, high = x.amin((-2, -1), keepdim=True), x.amax((-2, -1), keepdim=True)
        return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-6), x)

    def posterize(x: Tensor, s: Tensor) -> Tensor:
        step = 2.0 ** (4 * strength(s)).round()  # 8 bits down to 4
        return ((x * 255).round() / step).floor() * step / 255

    def solarize(x: Tensor, s: Tensor) -> Tensor:
        # values are whole, so a threshold that was rounded up still inverts its own value
        return torch.where((x * 255).round() < 255 * (1 - strength(s)) - 1e-3, x, 1 - x)

    return [
        lambda x, s: x,
        autocontrast,
        lambda x, s: enhance.equalize(x),
        rotate,
        posterize,
        solarize,
        saturation,
        lambda x, s: enhance.adjust_contrast_with_mean_subtraction(x, factor(s)),
        lambda x, s: enhance.adjust_brightness_accumulative(x, factor(s)),
        lambda x, s: enhance.sharpness(x, factor(s)),
        lambda x, s: shear(x, s, 1),
        lambda x, s: shear(x, s, 0),
        lambda x, s: shift(x, s, 1),
        lambda x, s: shift(x, s, 0),
    ]


def _warp(x: Tensor, rows: Sequence[Sequence[Tensor | float]], interpolation: str) -> Tensor:
    """Sample images elsewhere; beyond their borders they are 0.

    Args:
        x: [images, channels, height, width].
        rows: the matrix [[a, b, right], [c, d, down]], numbers or one per image. The pixel (x, y)
            from the centre is sampled at (a x + b y + right, c x + d y + down).
        interpolation: "nearest", "bilinear" or "bicubic".
    """
    h, w = x.shape[-2:]
    (a, b, right), (c, d, down) = rows
    # in units of half a side, in which torch's grids are
    values = (a, b * h / w, 2 * right / w, c * w / h, d, 2 * down / h)
    zero = x.new_zeros(len(x))
    matrix = torch.stack([zero + value for value in values], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode=interpolation, align_corners=False)
