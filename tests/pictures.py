"""Small images, and files of them, for the tests of image data."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from translution.apps.data.images import ImageOptions


def picture(h=12, w=10, seed=0, channels=3) -> Image.Image:
    """Smooth, so that a JPEG of it is close."""
    rows, columns = np.mgrid[:h, :w]
    planes = [rows * 7 + columns * 3 * c + 5 * (seed % 20) for c in range(1, channels + 1)]
    array = np.stack(planes, -1).clip(0, 255).astype(np.uint8)
    return Image.fromarray(array if channels == 3 else array[..., 0])


def encoded(image: Image.Image, form="PNG", **more) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **more)
    return buffer.getvalue()


def folder(tree, **more) -> ImageOptions:
    given = {"train": str(tree / "train"), "valid": str(tree / "valid"), "image_size": 8}
    return ImageOptions(format="folder", **(given | more))


def table(path: Path, images, labels, names=None, **more) -> str:
    columns = {"image": images, "label": labels} | more
    made = datasets.Dataset.from_dict(columns)
    if names:
        made = made.cast_column("label", datasets.ClassLabel(names=names))
    made.to_parquet(path)
    return str(path)


def parquet(train: str, **more) -> ImageOptions:
    return ImageOptions(format="parquet", train=train, **({"image_size": 8} | more))


PICTURES = [encoded(picture(8, 8, i)) for i in range(20)]
