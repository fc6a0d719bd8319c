"""Image files: finding them, decoding them with Pillow, and random parts of them."""

from __future__ import annotations

import functools
import glob
import io
import itertools
import math
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ...interop.images import Box, centred_box, converted, rounded

__all__ = ["decode", "find", "image_files", "open_image", "random_box"]

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
        OSError: a folder that cannot be read.
    """
    return _once(file for pattern in patterns for file in find(pattern, SUFFIXES))


def find(pattern: str | Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Find the file of this name, or all files with these suffixes in a folder or by a glob.

    Symbolic links are followed. A file that is reached by several of them is returned once.

    Raises:
        ValueError: nothing was found.
        OSError: a folder that cannot be read.
    """
    if not str(pattern):  # it would stand for the working directory
        raise ValueError("got an empty name, want that of a file or folder, or a glob")
    path = Path(pattern).expanduser()
    roots = [path] if path.exists() else list(_matching(str(path)))
    if not roots:
        raise ValueError(f"{pattern}: there is no such file or folder, and nothing matches it")
    if roots == [path] and not path.is_dir():
        if path.is_file():
            return [path]
        raise ValueError(f"{pattern}: is neither a file nor a folder")
    alone = [root for root in roots if not root.is_dir() and not _is_special(root)]
    folders = (files for root in roots if root.is_dir() for _, files in _walk(root))
    found = {*alone, *itertools.chain.from_iterable(folders)}
    wanted = [file for file in found if file.suffix.lower() in suffixes]
    if not wanted:
        raise ValueError(f"{pattern}: no file in it ends in {' '.join(suffixes)}")
    # of several paths to a file, the shortest is kept
    return sorted(_once(sorted(wanted, key=lambda file: (len(file.parts), file))), key=_natural)


def _matching(pattern: str) -> Iterator[Path]:
    """The paths that match a glob, of which ** stands for any folders, as `_walk` finds them."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from map(Path, glob.glob(pattern))
        return
    at = parts.index("**")
    for start in glob.glob(str(Path(*parts[:at]))):
        for folder, _ in _walk(Path(start)) if os.path.isdir(start) else ():
            yield from _matching(str(Path(glob.escape(str(folder)), *parts[at + 1 :])))


def _walk(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """A folder and all those below it with their files, without hidden ones.

    Each folder is returned once. A symbolic link to a folder that contains this one is not
    followed, because it leads back.
    """
    real = os.path.realpath(folder)
    seen = {real, *map(str, Path(real).parents)}
    folders, links = deque([folder]), deque[Path]()
    while folders or links:
        if folders:
            here = folders.popleft()
        else:  # after all real folders, whose paths are shorter
            here = links.popleft()
            if (real := os.path.realpath(here)) in seen:
                continue
            seen.add(real)
        found = []
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = here / entry.name
                if entry.is_dir(follow_symlinks=False):
                    if (real := os.path.realpath(path)) not in seen:
                        seen.add(real)
                        folders.append(path)
                elif entry.is_file(follow_symlinks=False):
                    found.append(path)
                elif path.is_dir():
                    links.append(path)
                elif not _is_special(path):
                    found.append(path)
        yield here, found


def _is_special(path: Path) -> bool:
    """Whether reading a path could wait forever: a pipe, a socket or a device."""
    return path.exists() and not path.is_file()


def _once(files: Iterable[Path]) -> list[Path]:
    """The files without those that symbolic links between folders lead to again."""
    real = functools.lru_cache(maxsize=None)(os.path.realpath)
    unique: dict[tuple[str, str], Path] = {}
    for file in files:
        unique.setdefault((real(file.parent), file.name), file)
    return list(unique.values())


def _natural(path: Path) -> list[str | int]:
    return [int(s) if i % 2 else s for i, s in enumerate(re.split(r"(\d+)", str(path)))]


# -- decoding ------------------------------------------------------------------------------------


def open_image(content: bytes) -> Image.Image:
    """Open an encoded image, of which only the header is read.

    Only the formats of `SUFFIXES` are read, whatever Pillow can open besides: for some of the
    others it starts a further program.

    Raises:
        UnidentifiedImageError: content of another format.
    """
    return Image.open(io.BytesIO(content), formats=_formats())


@functools.cache
def _formats() -> list[str]:
    """Pillow's names of the formats of `SUFFIXES`, as far as it was built with them."""
    Image.init()
    named = {Image.EXTENSION[suffix] for suffix in SUFFIXES if suffix in Image.EXTENSION}
    return sorted(named & Image.OPEN.keys())


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
        file = open_image(content)
        file.load()
        image = ImageOps.exif_transpose(file)
        if file.mode == "I" and file.format == "PNG":  # of 16 bits
            image = rounded(image)
        return converted(image, channels)
    except UnidentifiedImageError:  # its message contains an address in memory
        raise ValueError("not an image of a known format (PNG, JPEG, ...)") from None
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
