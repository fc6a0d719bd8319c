"""Images and their classes, from folders, Parquet, the Hugging Face hub, or digits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import BeforeValidator, Field, PositiveInt, model_validator
from torch import Tensor

from ..config import Options
from .augment import AugmentOptions
from .digits import anywhere, centre, place
from .sources import Source, read
from .transform import centred_box, decode, fit, image_files, random_box

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

Part = Literal["train", "valid", "test"]
PARTS: tuple[Part, ...] = ("train", "valid", "test")
CACHE = 2**28  # bytes of pixels that are kept in memory unasked

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
DIGIT = {"digits": 8, "mnist": 28}  # side in pixels
COLUMNS = {"image_column", "label_column", "classes"}
# The keys that only some formats have.
KEYS: dict[str, set[str]] = {
    "folder": {"train", "valid", "test", "cache"},
    "parquet": {"train", "valid", "test", "cache"} | COLUMNS,
    "hub": {"train", "valid", "test", "cache", "name", "subset", "revision"} | COLUMNS,
    "digits": {"canvas", "moved"},
    "mnist": {"canvas", "moved", "folder"},
}
NEEDED = {
    "folder": ("train",), "parquet": ("train",), "hub": ("name", "train"), "digits": (),
    "mnist": ("folder",),
}  # fmt: skip


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


class ImageOptions(Options):
    """Where images come from, and what they become.

    format: "folder" (of a folder per class), "parquet" (columns of encoded images and of labels),
        "hub" (a data set of the Hugging Face hub), "digits" (scikit-learn's), "mnist".
    train, valid, test: folders; Parquet files, folders of them or globs; or names of splits. Paths
        are relative to where the program runs. Without `valid`, `holdout` of train is held out.
    name, subset, revision: of a data set on the hub. folder: MNIST's four files.
    image_column, label_column, classes: the columns, and names for labels that have none.
    image_size: pixels, a side or [h, w]. channels: 1 or 3.
    canvas, moved: digits are put on a canvas of this side, in the centre, anywhere (true), or away
        from the centre by multiples of so many pixels, down and across.
    crop: share of the short side that evaluation sees (of images that have the size already, all).
    train_limit, valid_limit, test_limit: at most so many, drawn at random.
    mean, std: per channel, of values from 0 to 1.
    bad: images that cannot be read are refused, or skipped and counted.
    cache: keep decoded pixels in memory; null: if they are less than 256 MiB.
    """

    kind: Literal["images"] = "images"
    format: Literal["folder", "parquet", "hub", "digits", "mnist"]
    train: str | None = None
    valid: str | None = None
    test: str | None = None
    holdout: float = Field(0.1, ge=0, lt=1)
    name: str | None = None
    subset: str | None = None
    revision: str | None = None
    folder: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    classes: tuple[str, ...] | None = None
    image_size: Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_pair)]
    channels: Literal[1, 3]
    canvas: PositiveInt | None = None
    moved: bool | PositiveInt = False
    crop: float = Field(gt=0, le=1)
    resample: Literal["bilinear", "bicubic"] = "bicubic"
    train_limit: PositiveInt | None = None
    valid_limit: PositiveInt | None = None
    test_limit: PositiveInt | None = None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bad: Literal["refuse", "skip"] = "refuse"
    cache: bool | None = None
    augment: AugmentOptions = AugmentOptions()

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, content: Any) -> Any:
        """The defaults that depend on the format."""
        if not isinstance(content, dict):
            return content
        side = DIGIT.get(str(content.get("format")))
        defaults: dict[str, Any] = {"channels": 1 if side else 3, "crop": 1.0 if side else 0.875}
        if side:
            defaults["canvas"] = side
            defaults["image_size"] = content.get("canvas") or side
        if (content.get("channels") or defaults["channels"]) == 1:
            defaults |= {"mean": (0.5,), "std": (0.5,)}
        else:
            defaults |= IMAGENET
        given = {k: v for k, v in content.items() if v is not None or k not in defaults}
        return defaults | given

    @model_validator(mode="after")
    def _check(self) -> ImageOptions:
        for key in NEEDED[self.format]:
            if getattr(self, key) is None:
                raise ValueError(f"{key}: is missing; format {self.format!r} needs it")
        for key in sorted(set().union(*KEYS.values()) - KEYS[self.format]):
            value = getattr(self, key)
            if value != type(self).model_fields[key].default:
                raise ValueError(f"{key}: got {value!r}, want none with format {self.format!r}")
        if self.test is not None and self.test in (self.train, self.valid):
            raise ValueError(
                f"test: got {self.test!r}, want other images than train and valid have"
            )
        if self.valid is not None and self.valid == self.train:
            raise ValueError(f"valid: got {self.valid!r}, want other images than train has")
        if self.canvas is not None and self.canvas < DIGIT[self.format]:
            raise ValueError(
                f"canvas: got {self.canvas}, want at least a digit's side of {DIGIT[self.format]}"
            )
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels:
                raise ValueError(
                    f"{key}: got {len(getattr(self, key))} values, want {self.channels} (channels)"
                )
        if not all(value > 0 for value in self.std):
            raise ValueError(f"std: got {list(self.std)}, want values above 0")
        return self


class ImageBatch(NamedTuple):
    """images: uint8 [b, channels, h, w]. labels: int64 [b]. skipped: bad images left out."""

    images: Tensor
    labels: Tensor
    skipped: int


def collate(items: Sequence[tuple[Tensor, int] | None]) -> ImageBatch:
    """A batch of what is there; of nothing, images [0, 0, 0, 0]."""
    good = [item for item in items if item is not None]
    images = [image for image, _ in good]
    return ImageBatch(
        torch.stack(images) if images else torch.zeros(0, 0, 0, 0, dtype=torch.uint8),
        torch.tensor([label for _, label in good], dtype=torch.int64),
        len(items) - len(good),
    )


def load_image(path: Path | str, options: ImageOptions) -> Tensor:
    """An image file as evaluation sees it: uint8 [channels, h, w].

    Raises:
        ValueError: an image that cannot be decoded.
        OSError: a file that cannot be read.
    """
    try:
        image = decode(Path(path).read_bytes(), options.channels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    box = centred_box(*image.size, options.image_size, options.crop)
    return fit(image, options.image_size, box, options.resample)


def open_images(options: ImageOptions, part: Part, seed: int) -> Images:
    """A part of the data. Equal seeds give equal parts, orders and pixels.

    Where there is no `valid`, it is drawn from train by the seed, which then has to be the same
    for both.

    Raises:
        ValueError: data that are not what they should be, naming the part and the file or row.
        OSError: a file that cannot be read.
    """
    held = part == "valid" and options.valid is None
    if held and not options.holdout:
        raise ValueError("valid: got none and a holdout of 0, want one of them")
    source = read(options, "train" if held else part)
    n = len(source.labels)
    chosen = torch.arange(n)
    if options.valid is None and part != "test":
        count = max(1, round(n * options.holdout)) if options.holdout else 0
        if count >= n:
            raise ValueError(f"train: got {n} images, want more than the {count} held out")
        order = torch.randperm(n, generator=_seeded(seed, 0))
        chosen = order[:count] if held else order[count:]
    limit = getattr(options, f"{part}_limit")
    if limit is not None:
        order = torch.randperm(len(chosen), generator=_seeded(seed, 1, PARTS.index(part)))
        chosen = chosen[order[:limit]]
    return Images(options, part, seed, source, chosen.sort().values)


class Images(torch.utils.data.Dataset[Any]):
    """Images of one part; what is random in one depends on seed, epoch and index alone.

    Evaluation is the same in every epoch. classes: their names, by label. labels: int64 [n].
    """

    def __init__(
        self, options: ImageOptions, part: Part, seed: int, source: Source, chosen: Tensor
    ) -> None:
        self.options = options
        self.part: Part = part
        self.seed = seed
        self.classes = source.classes
        self.channels: int = options.channels
        self.labels = source.labels[chosen]
        self._source = source
        self._rows = chosen
        self._cache: _Pixels | None = None
        if not isinstance(source.images, Tensor) and self._worth_caching():
            self._cache = _Pixels.of(self._decoded(i) for i in range(len(self)))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | None:
        """(epoch, index) -> uint8 [channels, h, w] and a label; None for a bad image skipped."""
        epoch, index = key
        training, options = self.part == "train", self.options
        crops = options.augment.resized_crop if training else None
        # a generator takes as long to make as a small image to read
        generator = torch.Generator()
        if crops or options.moved:
            part = PARTS.index(self.part)
            generator = _seeded(self.seed, 2, part, epoch if training else 0, index)
        size, label = options.image_size, int(self.labels[index])
        image: Image.Image | None
        if isinstance(self._source.images, Tensor):
            pixels = self._placed(index, generator)
            if not crops and pixels.shape == size:  # nothing to cut or to resize
                return pixels.expand(self.channels, *size), label
            placed = Image.fromarray(pixels.numpy())
            image = placed if self.channels == 1 else placed.convert("RGB")
        else:
            image = self._decoded(index) if self._cache is None else self._cache[index]
        if image is None:
            return None
        if crops:
            box = random_box(*image.size, size, crops, options.augment.ratio, generator)
        else:
            box = centred_box(*image.size, size, options.crop)
        return fit(image, size, box, options.resample), label

    def _placed(self, index: int, generator: torch.Generator) -> Tensor:
        """A digit on its canvas, uint8 [canvas, canvas]."""
        digit = self._source.images[self._rows[index]]
        size, canvas = len(digit), self.options.canvas or len(digit)
        moved = self.options.moved
        if moved:
            where = anywhere(1, size, canvas, generator, step=int(moved))
        else:
            where = centre(1, size, canvas)
        return place(digit[None], canvas, where)[0, 0]

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
        if self.options.cache is not None or not len(self):
            return bool(self.options.cache)
        some = range(0, len(self), max(1, len(self) // 16))
        sizes = [i.width * i.height * self.channels for i in map(self._decoded, some) if i]
        return sum(sizes) / max(1, len(sizes)) * len(self) <= CACHE


@dataclass
class _Pixels:
    """Decoded images end to end in one tensor, which the workers of a loader share."""

    pixels: Tensor  # uint8, flat
    ends: Tensor
    shapes: Tensor  # [n, axes]; a bad image has zeros

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


def _seeded(*numbers: int) -> torch.Generator:
    """A generator that all of these numbers decide."""
    (seed,) = np.random.SeedSequence(numbers).generate_state(1)
    return torch.Generator().manual_seed(int(seed))
