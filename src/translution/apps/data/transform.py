"""Image files: finding them, decoding them with Pillow, and random parts of them."""

from __future__ import annotations

import glob
import io
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ...interop.images import Box, centred_box, converted, rounded

__all__ = ["decode", "find", "image_files", "random_box"]

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".jp2", ".avif",
)  # fmt: skip
TRIES = 10  # attempts to draw a random box that lies within the image


# -- finding -------------------------------------------------------------------------------------


def image_files(patterns: Sequence[str]) -> list[Path]:
    """Find image files.

    Args:
        patterns: files, folders (searched with all their subfolders) and globs.

    Returns:
        Each file once, in natural order (2 before 10) within each pattern.

    Raises:
        ValueError: a pattern without images.
    """
    return list(dict.fromkeys(file for pattern in patterns for file in find(pattern, SUFFIXES)))


def find(pattern: str | Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Find the file of this name, or all files with these suffixes in a folder or by a glob.

    Raises:
        ValueError: nothing was found.
    """
    path = Path(pattern).expanduser()
    roots = [path] if path.exists() else [Path(p) for p in glob.glob(str(path), recursive=True)]
    if not roots:
        raise ValueError(f"{pattern}: there is no such file or folder, and nothing matches it")
    if roots == [path] and path.is_file():
        return [path]
    found = {file for root in roots for file in ([root] if root.is_file() else _below(root))}
    wanted = [file for file in found if file.suffix.lower() in suffixes]
    if not wanted:
        raise ValueError(f"{pattern}: no file in it ends in {' '.join(suffixes)}")
    return sorted(wanted, key=_natural)


def _below(folder: Path) -> list[Path]:
    """All files below a folder, without hidden ones."""
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in files if not name.startswith(".")]
    return found


def _natural(path: Path) -> list[str | int]:
    return [int(s) if i % 2 else s for i, s in enumerate(re.split(r"(\d+)", str(path)))]


# -- decoding ------------------------------------------------------------------------------------


def decode(content: bytes, channels: int) -> Image.Image:
    """Decode an image, turned upright, in mode RGB (3 channels) or L (1 channel).

    Transparent pixels are laid on white, values of 16 bits are rounded to 8, and of an animation
    the first image is taken.

    Raises:
        ValueError: content that is not a readable image. The message has no file name.
    """
    if not content:
        raise ValueError("it is empty")
    try:
        file = Image.open(io.BytesIO(content))
        file.load()
        image = ImageOps.exif_transpose(file)
        if file.mode == "I" and file.format == "PNG":  # of 16 bits
            image = rounded(image)
        return converted(image, channels)
    except UnidentifiedImageError:  # its message contains an address in memory
        raise ValueError("not an image, or of an unknown format") from None
    except Exception as error:  # for damaged data Pillow raises nearly every class
        raise ValueError(f"not a readable image ({error})") from None


# -- cutting -------------------------------------------------------------------------------------


def random_box(
    width: int,
    height: int,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> Box:
    """A random box for a random resized crop.

    If no attempt gives a box within the image, it is the largest centred one.

    Args:
        width, height: the size of the image in pixels.
        size: (height, width) that the box will be resized to.
        scale: the least and largest share of the image's area.
        ratio: the least and largest stretch relative to the shape of `size`. The logarithm of the
            stretch is uniform.
        generator: where the random numbers come from.
    """
    for _ in range(TRIES):
        area, stretch, x, y = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area = width * height * (scale[0] + area * (scale[1] - scale[0]))
        low, high = math.log(ratio[0]), math.log(ratio[1])
        shape = size[1] / size[0] * math.exp(low + stretch * (high - low))
        columns, rows = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 1 <= columns <= width and 1 <= rows <= height:
            left, top = int(x * (width - columns + 1)), int(y * (height - rows + 1))
            return left, top, left + columns, top + rows
    return centred_box(width, height, size, 1.0)
