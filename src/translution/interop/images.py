"""Makes the input of a model of an image, as the model's preprocessing describes. Needs Pillow."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..models.preprocessing import Preprocessing

__all__ = ["centred_box", "converted", "fit", "normalised", "prepare", "rounded"]

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


def prepare(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """The pixels that a model sees of an image, before they are normalised.

    Training, evaluation, prediction and the image processor for transformers all call this
    function.

    Args:
        image: an upright image of any mode with a known range.
        preprocessing: the description that belongs to the model.

    Returns:
        uint8 [channels, height, width].

    Raises:
        ValueError: an image of 32 bits per value.
    """
    size, canvas = preprocessing.image_size, preprocessing.canvas
    if canvas is not None and preprocessing.digit_size is not None:
        digit = converted(image, 1)
        image = _on_canvas(digit, preprocessing.digit_size, canvas, preprocessing.resample)
    image = converted(image, preprocessing.channels)
    box = centred_box(*image.size, size, preprocessing.crop)
    return fit(image, size, box, preprocessing.resample)


def normalised(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Images uint8 [batch, channels, height, width] as the model's input, float32."""
    mean, std = (
        torch.tensor(values, device=pixels.device).view(-1, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    return (pixels.float() / 255 - mean) / std


def _on_canvas(digit: Image.Image, size: int, canvas: int, resample: str) -> Image.Image:
    """A digit, white on black, in the centre of a black canvas, unless it is on one already."""
    if digit.size == (canvas, canvas):
        return digit
    scale = size / max(digit.size)
    if scale != 1:
        width, height = (max(1, round(side * scale)) for side in digit.size)
        digit = digit.resize((width, height), RESAMPLING[resample])
    placed = Image.new("L", (canvas, canvas))
    placed.paste(digit, ((canvas - digit.width) // 2, (canvas - digit.height) // 2))
    return placed


def converted(image: Image.Image, channels: int) -> Image.Image:
    """An image in mode RGB (3 channels) or L (1 channel).

    Transparent pixels are laid on white, and values of 16 bits are rounded to 8.

    Raises:
        ValueError: an image of 32 bits per value.
    """
    mode = "RGB" if channels == 3 else "L"
    if image.mode.startswith("I;16"):
        image = rounded(image)  # Pillow's convert() would clip at 255
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}: 32 bits per value have no known range, want 8 or 16")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image if image.mode == mode else image.convert(mode)


def rounded(image: Image.Image) -> Image.Image:
    """An image with values from 0 to 65535 in eight bits."""
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def centred_box(width: int, height: int, size: tuple[int, int], crop: float) -> Box:
    """The part of an image that evaluation uses: centred, of the shape of `size` (height, width).

    It covers the share `crop` of the side that limits it. Cutting it out and resizing it does in
    one step what is usually done in two: resizing to size / crop and cutting out the centre. An
    image that already has `size` is used whole.
    """
    if (height, width) == tuple(size):
        return 0, 0, width, height
    rows = crop * min(height, width * size[0] / size[1])
    columns = rows * size[1] / size[0]
    left, top = (width - columns) / 2, (height - rows) / 2
    return left, top, left + columns, top + rows


def fit(image: Image.Image, size: tuple[int, int], box: Box, resample: str) -> Tensor:
    """Cut out a box and resize it to `size`: uint8 [channels, height, width].

    An image that already has this size is not resampled.
    """
    height, width = size
    if image.size != (width, height) or box != (0, 0, width, height):
        image = image.resize((width, height), RESAMPLING[resample], box=box)
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
