"""Images and their classes as a data set: opening a part, reading samples, making batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...interop.images import fit, prepare
from ...models.preprocessing import Preprocessing
from .digits import anywhere, centre, place, shifted
from .image_options import ImageOptions
from .order import generator_of
from .parts import PARTS, Part
from .sources import Source, read_source
from .transform import decode, image_files, random_box

__all__ = [
    "ImageBatch",
    "ImageOptions",
    "Images",
    "Part",
    "collate",
    "image_files",
    "load_image",
    "open_images",
]

CACHE_BYTES = 2**28  # decoded images that take less are kept in memory by default


class ImageBatch(NamedTuple):
    """A batch of images.

    images: uint8 [batch, channels, height, width].
    labels: int64 [batch].
    skipped: the number of unreadable images that were left out.
    """

    images: Tensor
    labels: Tensor
    skipped: int


def collate(items: Sequence[tuple[Tensor, int] | None]) -> ImageBatch:
    """Make a batch of the samples that could be read. Without any, images is [0, 0, 0, 0]."""
    good = [item for item in items if item is not None]
    images = [image for image, _ in good]
    return ImageBatch(
        torch.stack(images) if images else torch.zeros(0, 0, 0, 0, dtype=torch.uint8),
        torch.tensor([label for _, label in good], dtype=torch.int64),
        len(items) - len(good),
    )


def load_image(path: Path | str, options: ImageOptions | Preprocessing) -> Tensor:
    """Read an image file and prepare it as evaluation does: uint8 [channels, height, width].

    Args:
        path: the file.
        options: the options of the data, or the preprocessing that is saved with a model.

    Raises:
        ValueError: an image that cannot be decoded.
        OSError: a file that cannot be read.
    """
    preprocessing = options.preprocessing() if isinstance(options, ImageOptions) else options
    try:
        image = decode(Path(path).read_bytes(), preprocessing.channels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return prepare(image, preprocessing)


def open_images(
    options: ImageOptions, part: Part, seed: int, preprocessing: Preprocessing | None = None
) -> Images:
    """Open a part of the data. Equal seeds give equal parts, orders and pixels.

    Without `options.valid`, the seed decides which training images are held out for validation, so
    both parts must be opened with the same seed.

    Args:
        options: the options of the data.
        part: which part.
        seed: the seed of the run.
        preprocessing: replaces that of the options in evaluation, for example by a checkpoint's.

    Raises:
        ValueError: wrong data; the message names the part and the file or row.
        OSError: a file that cannot be read.
    """
    held_out = part == "valid" and options.valid is None
    if held_out and not options.holdout:
        raise ValueError("valid: got none and a holdout of 0, want one of them")
    source = read_source(options, "train" if held_out else part)
    n = len(source.labels)
    chosen = torch.arange(n)
    if options.valid is None and part != "test":
        count = max(1, round(n * options.holdout)) if options.holdout else 0
        if count >= n:
            raise ValueError(f"train: got {n} images, want more than the {count} held out")
        order = torch.randperm(n, generator=generator_of(seed, 0))
        chosen = order[:count] if held_out else order[count:]
    limit = getattr(options, f"{part}_limit")
    if limit is not None:
        order = torch.randperm(len(chosen), generator=generator_of(seed, 1, PARTS.index(part)))
        chosen = chosen[order[:limit]]
    return Images(options, part, seed, source, chosen.sort().values, preprocessing)


class Images(torch.utils.data.Dataset[Any]):
    """The images of one part. The random changes of a sample depend on the seed, the epoch and the
    index alone; evaluation is the same in every epoch.

    Attributes:
        classes: the names of the classes; label i stands for the i-th.
        channels: 1 (grey) or 3 (RGB).
        preprocessing: what evaluation does to an image, with the names of the classes.
        labels: int64 [images].
        unreadable: how many images cannot be read, or None if they were not all decoded yet.
    """

    def __init__(
        self,
        options: ImageOptions,
        part: Part,
        seed: int,
        source: Source,
        chosen: Tensor,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        """chosen: the rows of `source` that belong to this part, int64 [images]."""
        self.options = options
        self.part: Part = part
        self.seed = seed
        self.classes = source.classes
        self.channels: int = options.channels
        self.preprocessing = preprocessing or options.preprocessing(source.classes)
        self.labels = source.labels[chosen]
        self.unreadable: int | None = None
        self._source = source
        self._rows = chosen
        self._cache: _Pixels | None = None
        self._epochs: dict[int, Tensor] = {}
        if isinstance(source.images, Tensor):
            self.unreadable = 0
        elif self._worth_caching():
            self._cache = _Pixels.of(self._decoded(i) for i in range(len(self)))
            self.unreadable = int((self._cache.shapes[:, 0] == 0).sum())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | None:
        """(epoch, index) -> uint8 [channels, height, width] and a label; None for an unreadable
        image that is skipped."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[tuple[Tensor, int] | None]:
        """Several samples at once, which is how torch's DataLoader reads a batch."""
        if not isinstance(self._source.images, Tensor):
            return [self._sample(key, None) for key in keys]
        placed = self._on_canvases(keys)
        size = self.options.image_size
        if self._crops is None and placed.shape[1:] == size:  # nothing to cut or to resize
            pixels = placed[:, None].expand(-1, self.channels, *size)
            labels = self.labels[[index for _, index in keys]].tolist()
            return list(zip(pixels, labels, strict=True))
        return [self._sample(key, digit) for key, digit in zip(keys, placed, strict=True)]

    @property
    def _crops(self) -> tuple[float, float] | None:
        return self.options.augment.resized_crop if self.part == "train" else None

    def _sample(self, key: tuple[int, int], digit: Tensor | None) -> tuple[Tensor, int] | None:
        """A sample, from a digit on its canvas [height, width] or else from the source."""
        epoch, index = key
        label = int(self.labels[index])
        image: Image.Image | None
        if digit is not None:
            grey = Image.fromarray(digit.numpy())
            image = grey if self.channels == 1 else grey.convert("RGB")
        else:
            image = self._decoded(index) if self._cache is None else self._cache[index]
        if image is None:
            return None
        if self._crops is None:
            return prepare(image, self.preprocessing), label
        generator = generator_of(self.seed, 2, PARTS.index(self.part), epoch, index)
        size, options = self.options.image_size, self.options
        box = random_box(*image.size, size, self._crops, options.augment.ratio, generator)
        return fit(image, size, box, options.resample), label

    def _on_canvases(self, keys: Sequence[tuple[int, int]]) -> Tensor:
        """Digits on their canvases, uint8 [samples, canvas, canvas]."""
        index = torch.tensor([index for _, index in keys])
        digits = self._source.images[self._rows[index]]
        size = digits.shape[-1]
        canvas = self.options.canvas or size
        if not self.options.moved and not self.options.shift:
            return place(digits, canvas, centre(len(digits), size, canvas))[:, 0]
        where = torch.stack([self._places(epoch)[index] for epoch, index in keys])
        return place(digits, canvas, where)[:, 0]

    def _places(self, epoch: int) -> Tensor:
        """Where every digit lies in an epoch, int64 [images, 2]. Evaluation has one epoch."""
        epoch = epoch if self.part == "train" else 0
        if epoch not in self._epochs:
            size = self._source.images.shape[-1]
            generator = generator_of(self.seed, 2, PARTS.index(self.part), epoch)
            options, canvas = self.options, self.options.canvas or size
            self._epochs.pop(epoch - 2, None)  # a batch has samples of two epochs at most
            draw, by = (shifted, options.shift) if options.shift else (anywhere, int(options.moved))
            self._epochs[epoch] = draw(len(self), size, canvas, generator, by)
        return self._epochs[epoch]

    def _decoded(self, index: int) -> Image.Image | None:
        row = int(self._rows[index])
        image = self._source.images[row][self._source.column]
        if isinstance(image, dict):
            content, path = image["bytes"], image["path"]
        else:
            content, path = image, None
        name = f"{self._source.name}: row {row}"
        if content is None and path is not None:
            name, content = path, Path(path).read_bytes()
        try:
            return decode(content or b"", self.channels)
        except ValueError as error:
            if self.options.bad == "skip":
                return None
            raise ValueError(f"{self.part}: {name}: {error}") from None

    def _worth_caching(self) -> bool:
        """Estimate the size of all decoded images from 16 of them."""
        if self.options.cache is not None or not len(self):
            return bool(self.options.cache)
        sample = range(0, len(self), max(1, len(self) // 16))
        sizes = [i.width * i.height * self.channels for i in map(self._decoded, sample) if i]
        return sum(sizes) / max(1, len(sizes)) * len(self) <= CACHE_BYTES


@dataclass
class _Pixels:
    """Decoded images one after the other in one tensor, which loader processes share.

    pixels: uint8 [bytes]. ends: int64 [images], where each image ends in `pixels`.
    shapes: int64 [images, 2 or 3], the shape of each image; zeros for an unreadable one.
    """

    pixels: Tensor
    ends: Tensor
    shapes: Tensor

    @classmethod
    def of(cls, images: Iterator[Image.Image | None]) -> _Pixels:
        arrays = [None if image is None else np.asarray(image) for image in images]
        axes = max((a.ndim for a in arrays if a is not None), default=2)
        shapes = [(0,) * axes if a is None else a.shape for a in arrays]
        flat = [a.reshape(-1) for a in arrays if a is not None]
        pixels = np.concatenate(flat) if flat else np.zeros(0, np.uint8)
        ends = np.cumsum([0 if a is None else a.size for a in arrays])
        return cls(torch.from_numpy(pixels), torch.from_numpy(ends), torch.tensor(shapes))

    def __getitem__(self, index: int) -> Image.Image | None:
        shape = self.shapes[index].tolist()
        size = int(np.prod(shape))
        end = int(self.ends[index])
        return Image.fromarray(self.pixels[end - size : end].view(shape).numpy()) if size else None
