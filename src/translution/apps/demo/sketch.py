"""Convert a drawing or an uploaded image to a digit in the form of scikit-learn's digits.

Those digits were made from bitmaps of 32×32 pixels, each filled by one digit. The bitmaps were cut
into blocks of 4×4 pixels, and the inked pixels of each block were counted, which gives 8×8 numbers
from 0 to 16. This module does the same with an image, or with the lines of a pen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ..data.transform import decode, open_image

__all__ = ["MOST_BYTES", "MOST_PIXELS", "SIDE", "bitmap", "from_image", "from_lines", "reduced"]

SIDE, BLOCK = 32, 4
PEN = 4  # the width of the pen in pixels of the bitmap
FINE = 8  # lines are drawn larger by this factor, and then reduced
MOST_BYTES, MOST_PIXELS = 5 * 2**20, 16 * 10**6
MOST_POINTS = 20_000  # the largest number of points of a drawing
LARGEST = 3  # the largest factor by which a drawing is enlarged

Line = Sequence[Sequence[float]]


def reduced(bits: np.ndarray) -> Tensor:
    """Count the inked pixels of each block of 4×4 pixels.

    Args:
        bits: the bitmap [32, 32], where True is ink.

    Returns:
        The digit, float32 [8, 8] from 0 to 1 in steps of 1/16.

    Raises:
        ValueError: the bitmap has another shape.
    """
    if bits.shape != (SIDE, SIDE):
        raise ValueError(f"bits: got {bits.shape}, want {(SIDE, SIDE)}")
    blocks = bits.astype(bool).reshape(SIDE // BLOCK, BLOCK, SIDE // BLOCK, BLOCK)
    return torch.from_numpy(blocks.sum((1, 3)).astype(np.float32)) / BLOCK**2


def bitmap(ink: Image.Image) -> np.ndarray:
    """Crop an image to its bright pixels, and scale it to 32×32 pixels.

    Args:
        ink: a grey image (mode L), light on dark.

    Returns:
        The bitmap, bool [32, 32]. The proportions of the image are kept.

    Raises:
        ValueError: no pixel is bright.
    """
    box = ink.point(lambda value: 255 * (value >= 128)).getbbox()
    if box is None:
        raise ValueError("there is nothing to see in it")
    part = ink.crop(box)
    scale = SIDE / max(part.size)
    width, height = (max(1, round(n * scale)) for n in part.size)
    part = part.resize((width, height), Image.Resampling.BOX)
    whole = Image.new("L", (SIDE, SIDE))
    whole.paste(part, ((SIDE - width) // 2, (SIDE - height) // 2))
    return np.asarray(whole) >= 128


def from_lines(lines: Sequence[Line]) -> Tensor | None:
    """Convert the lines of a pen to a digit.

    Args:
        lines: the lines; each is a sequence of points (x, y) from 0 to 1.

    Returns:
        The digit, float32 [8, 8] from 0 to 1; None if there is no point.

    Raises:
        ValueError: a point has a wrong form, or there are too many points.
    """
    points = [point for line in lines for point in line]
    if not points:
        return None
    if len(points) > MOST_POINTS:
        raise ValueError(f"lines: got {len(points)} points, want at most {MOST_POINTS}")
    if not all(len(p) == 2 and all(math.isfinite(v) and 0 <= v <= 1 for v in p) for p in points):
        raise ValueError("lines: want points (x, y) of values 0 to 1")
    # the points are scaled before they are drawn, so that the width of the pen does not change
    (left, top), (right, bottom) = np.min(points, 0), np.max(points, 0)
    extent = float(max(right - left, bottom - top))
    scale = min((SIDE - PEN) / extent / SIDE if extent else LARGEST, LARGEST)
    middle = np.array([left + right, top + bottom]) / 2
    side = SIDE * FINE
    image = Image.new("L", (side, side))
    draw, radius = ImageDraw.Draw(image), PEN * FINE / 2
    for line in lines:
        at = [tuple(((np.array(p) - middle) * scale + 0.5) * side) for p in line]
        draw.line(at, fill=255, width=PEN * FINE, joint="curve")
        for x, y in at:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    small = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    return reduced(np.asarray(small) >= 128)


def from_image(content: bytes) -> Tensor:
    """Convert an image file to a digit.

    Args:
        content: the bytes of an encoded image with a digit, dark on light or light on dark.

    Returns:
        The digit, float32 [8, 8] from 0 to 1.

    Raises:
        ValueError: there are too many bytes or pixels, it is not an image, or it is empty.
    """
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has {len(content):,} bytes, want at most {MOST_BYTES:,}")
    try:
        with open_image(content) as file:
            width, height = file.size
    except Image.DecompressionBombError:
        raise ValueError(f"it has more than {MOST_PIXELS:,} pixels") from None
    except Exception:  # decode raises an error that names the reason
        width, height = 1, 1
    if width * height > MOST_PIXELS:
        raise ValueError(f"it has {width}×{height} pixels, want at most {MOST_PIXELS:,} in all")
    image = ImageOps.autocontrast(decode(content, 1))
    values = np.asarray(image)
    if values.min() == values.max():
        raise ValueError("it has one colour only")
    edge = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
    if np.median(edge) >= 128:  # the colour of most of the border is the background
        image = ImageOps.invert(image)
    return reduced(bitmap(image))
