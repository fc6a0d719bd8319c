"""What a user draws or uploads, made a digit as scikit-learn's were.

Those came from bitmaps of 32×32 that the writing filled, in blocks of 4×4 whose ink was counted:
8×8 numbers from 0 to 16. So here too. What comes in is an image or the lines of a pen, of any size.
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
PEN = 4  # pixels of the bitmap
FINE = 8  # lines are drawn so much larger, and then reduced
MOST_BYTES, MOST_PIXELS = 5 * 2**20, 16 * 10**6
MOST_POINTS = 20_000  # of a drawing
LARGEST = 3  # a dot is not blown up to fill the bitmap

Line = Sequence[Sequence[float]]


def reduced(bits: np.ndarray) -> Tensor:
    """A bitmap [32, 32] -> ink per block of 4×4, [8, 8], from 0 to 1 in steps of 1/16."""
    if bits.shape != (SIDE, SIDE):
        raise ValueError(f"bits: got {bits.shape}, want {(SIDE, SIDE)}")
    blocks = bits.astype(bool).reshape(SIDE // BLOCK, BLOCK, SIDE // BLOCK, BLOCK)
    return torch.from_numpy(blocks.sum((1, 3)).astype(np.float32)) / BLOCK**2


def bitmap(ink: Image.Image) -> np.ndarray:
    """What is bright in an image (mode L), filling 32×32 with its shape kept, as booleans.

    Raises:
        ValueError: there is nothing.
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
    """A digit [8, 8] from a pen's lines, points (x, y) with values 0 to 1; None without a point.

    Raises:
        ValueError: points that are none, or too many.
    """
    points = [point for line in lines for point in line]
    if not points:
        return None
    if len(points) > MOST_POINTS:
        raise ValueError(f"lines: got {len(points)} points, want at most {MOST_POINTS}")
    if not all(len(p) == 2 and all(math.isfinite(v) and 0 <= v <= 1 for v in p) for p in points):
        raise ValueError("lines: want points (x, y) of values 0 to 1")
    # first made to fill the square, then drawn: the pen is as wide however large one writes
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
    """A digit [8, 8] from an encoded image of one, dark on light or light on dark.

    Raises:
        ValueError: too many bytes or pixels, not an image, or nothing on it.
    """
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has {len(content):,} bytes, want at most {MOST_BYTES:,}")
    try:
        with open_image(content) as file:
            width, height = file.size
    except Image.DecompressionBombError:
        raise ValueError(f"it has more than {MOST_PIXELS:,} pixels") from None
    except Exception:  # decode says what is wrong
        width, height = 1, 1
    if width * height > MOST_PIXELS:
        raise ValueError(f"it has {width}×{height} pixels, want at most {MOST_PIXELS:,} in all")
    image = ImageOps.autocontrast(decode(content, 1))
    values = np.asarray(image)
    if values.min() == values.max():
        raise ValueError("it has one colour only")
    edge = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
    if np.median(edge) >= 128:  # paper is what the border shows
        image = ImageOps.invert(image)
    return reduced(bitmap(image))
