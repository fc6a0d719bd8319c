"""Image files: finding them, decoding them, and fitting them to one size. With Pillow."""

from __future__ import annotations

import glob
import io
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

__all__ = ["centred_box", "decode", "find", "fit", "image_files", "random_box"]

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".jp2", ".avif",
)  # fmt: skip
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
TRIES = 10  # at a random box that lies within the image

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


# -- finding -------------------------------------------------------------------------------------


def image_files(patterns: Sequence[str]) -> list[Path]:
    """The image files that these files, folders (with all below them) and globs name.

    In natural order (2 before 10) within each pattern, each file once.

    Raises:
        ValueError: a pattern that no image is found for.
    """
    return list(dict.fromkeys(file for pattern in patterns for file in find(pattern, SUFFIXES)))


def find(pattern: str | Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The file of this name, or the files with these suffixes in a folder or matching a glob."""
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
    """All files below a folder; hidden ones are no data."""
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in files if not name.startswith(".")]
    return found


def _natural(path: Path) -> list[str | int]:
    return [int(s) if i % 2 else s for i, s in enumerate(re.split(r"(\d+)", str(path)))]


# -- decoding ------------------------------------------------------------------------------------


def decode(content: bytes, channels: int) -> Image.Image:
    """An encoded image, upright, in mode RGB (3 channels) or L (1).

    Transparent pixels lie on white, 16 bits are rounded to 8, of an animation the first is taken.

    Raises:
        ValueError: what is wrong with it, without a name.
    """
    if not content:
        raise ValueError("it is empty")
    try:
        file = Image.open(io.BytesIO(content))
        file.load()
        image = ImageOps.exif_transpose(file)
        if file.mode.startswith("I;16") or (file.mode == "I" and file.format == "PNG"):
            image = _rounded(image)  # convert() would clip at 255
        return _plain(image, "RGB" if channels == 3 else "L")
    except UnidentifiedImageError:  # its text has an address in memory
        raise ValueError("not an image, or of an unknown format") from None
    except Exception as error:  # of damaged data Pillow raises nearly everything
        raise ValueError(f"not a readable image ({error})") from None


def _rounded(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _plain(image: Image.Image, mode: str) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}: 32 bits per value have no known range, want 8 or 16")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image if image.mode == mode else image.convert(mode)


# -- fitting -------------------------------------------------------------------------------------


def centred_box(width: int, height: int, size: tuple[int, int], crop: float) -> Box:
    """What evaluation sees: the shape of `size` [h, w], over `crop` of the side that fits closer.

    To take it and resize it is to resize the short side to size / crop and to cut out the centre,
    in one step. Of an image that has the size already it is everything.
    """
    if (height, width) == tuple(size):
        return 0, 0, width, height
    rows = crop * min(height, width * size[0] / size[1])
    columns = rows * size[1] / size[0]
    left, top = (width - columns) / 2, (height - rows) / 2
    return left, top, left + columns, top + rows


def random_box(
    width: int,
    height: int,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> Box:
    """A random resized crop: a share of the area in `scale`, stretched by a factor in `ratio`.

    The stretch is relative to the shape of `size` [h, w] and uniform in its logarithm. Where no
    such box is found within the image it is the largest centred one.
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


def fit(image: Image.Image, size: tuple[int, int], box: Box, resample: str) -> Tensor:
    """This box of the image as uint8 [channels, h, w]; resampled only if it differs in size."""
    height, width = size
    if image.size != (width, height) or box != (0, 0, width, height):
        image = image.resize((width, height), RESAMPLING[resample], box=box)
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
