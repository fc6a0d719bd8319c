"""The options of image data: where images come from and how they are prepared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ...models.preprocessing import Preprocessing
from ..config import Count, Options, Place
from .augment import AugmentOptions

__all__ = ["ImageOptions"]

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
DIGIT_SIDES = {"digits": 8, "mnist": 28}  # pixels
COLUMNS = {"image_column", "label_column", "classes"}
# The keys that only some formats accept.
KEYS: dict[str, set[str]] = {
    "folder": {"train", "valid", "test", "cache"},
    "parquet": {"train", "valid", "test", "cache"} | COLUMNS,
    "hub": {"train", "valid", "test", "cache", "name", "subset", "revision"} | COLUMNS,
    "digits": {"canvas", "moved", "shift"},
    "mnist": {"canvas", "moved", "shift", "folder"},
}
# The keys that a format requires.
REQUIRED = {
    "folder": ("train",), "parquet": ("train",), "hub": ("name", "train"), "digits": (),
    "mnist": ("folder",),
}  # fmt: skip


MOST_PIXELS = 2**14  # of a side
Side = Annotated[int, Field(gt=0, le=MOST_PIXELS)]
SCALE = (1e-6, 1e6)  # the least and largest deviation, and the largest mean


def _pair(value: Any) -> Any:
    if isinstance(value, int) and not 0 < value <= MOST_PIXELS:
        raise ValueError(f"got {value}, want 1 to {MOST_PIXELS} pixels")
    return (value, value) if isinstance(value, int) else value


class ImageOptions(Options):
    """Where images come from, and how they are prepared.

    format: "folder" (one folder per class), "parquet" (a column of encoded images and a column of
        labels), "hub" (a data set of the Hugging Face hub), "digits" (the digits of scikit-learn)
        or "mnist".
    train, valid, test: for "folder", folders; for "parquet", files, folders of them or globs; for
        "hub", names of splits. Relative paths start at the working directory. Without `valid`, the
        share `holdout` of the training images is held out for validation.
    name, subset, revision: which data set of the hub.
    folder: the folder with the four files of MNIST. Missing files are downloaded into it.
    image_column, label_column: names of the columns. classes: names for labels without names.
    image_size: height and width in pixels, given as one side or as [height, width].
    channels: 1 (grey) or 3 (RGB).
    canvas: the side in pixels of the black canvas that a digit is placed on.
    moved: false places a digit in the centre of its canvas, true places it anywhere. A number of
        pixels places it at a multiple of that distance from the centre, both down and across.
    shift: places a digit at this distance in pixels from the centre, both down or up and across, in
        a random direction.
    crop: the share of the shorter side that evaluation keeps. An image that already has
        `image_size` is kept whole.
    resample: how Pillow interpolates when an image is resized.
    train_limit, valid_limit, test_limit: use at most so many images, drawn at random.
    mean, std: per channel, for values from 0 to 1. Images are normalised with them.
    bad: "refuse" stops at an image that cannot be read, "skip" leaves it out and counts it.
    cache: whether decoded images stay in memory. null keeps them if they take less than 256 MiB.
    augment: random changes of training images, see `AugmentOptions`.
    """

    kind: Literal["images"] = "images"
    format: Literal["folder", "parquet", "hub", "digits", "mnist"]
    train: Place | None = None
    valid: Place | None = None
    test: Place | None = None
    holdout: float = Field(0.1, ge=0, lt=1)
    name: Place | None = None
    subset: str | None = None
    revision: str | None = None
    folder: Place | None = None
    image_column: str = "image"
    label_column: str = "label"
    classes: tuple[str, ...] | None = None
    image_size: Annotated[tuple[Side, Side], BeforeValidator(_pair)]
    channels: Literal[1, 3]
    canvas: Side | None = None
    moved: bool | Side = False
    shift: int = Field(0, ge=0, le=MOST_PIXELS)
    crop: float = Field(gt=0, le=1)
    resample: Literal["bilinear", "bicubic"] = "bicubic"
    train_limit: Count | None = None
    valid_limit: Count | None = None
    test_limit: Count | None = None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bad: Literal["refuse", "skip"] = "refuse"
    cache: bool | None = None
    augment: AugmentOptions = AugmentOptions()

    def preprocessing(self, classes: Sequence[str] | None = None) -> Preprocessing:
        """What these options do to an image in evaluation, as the description for a model.

        Args:
            classes: the names of the classes.
        """
        return Preprocessing(
            self.image_size,
            self.channels,
            self.mean,
            self.std,
            self.crop,
            self.resample,
            digit_size=None if self.canvas is None else DIGIT_SIDES[self.format],
            canvas=self.canvas,
            classes=None if classes is None else tuple(classes),
        )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, content: Any) -> Any:
        """Add the defaults that depend on the format."""
        if not isinstance(content, dict):
            return content
        side = DIGIT_SIDES.get(str(content.get("format")))
        defaults: dict[str, Any] = {"channels": 1 if side else 3, "crop": 1.0 if side else 0.875}
        if side:
            defaults["canvas"] = side
            canvas = content.get("canvas") or side
            wrong = isinstance(canvas, int) and not 0 < canvas <= MOST_PIXELS
            defaults["image_size"] = side if wrong else canvas  # so that only the canvas is named
        if (content.get("channels") or defaults["channels"]) == 1:
            defaults |= {"mean": (0.5,), "std": (0.5,)}
        else:
            defaults |= IMAGENET
        given = {k: v for k, v in content.items() if v is not None or k not in defaults}
        return defaults | given

    @model_validator(mode="after")
    def _check(self) -> ImageOptions:
        for key in REQUIRED[self.format]:
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
        if self.canvas is not None and self.canvas < DIGIT_SIDES[self.format]:
            side = DIGIT_SIDES[self.format]
            raise ValueError(f"canvas: got {self.canvas}, want at least a digit's side of {side}")
        if self.moved and self.shift:
            raise ValueError(f"shift: got {self.shift}, want 0 where moved is {self.moved}")
        if self.shift > (reach := ((self.canvas or 0) - DIGIT_SIDES.get(self.format, 0)) // 2):
            raise ValueError(
                f"shift: got {self.shift}, but a digit can move by {reach} pixels at most in all "
                f"directions on a canvas of {self.canvas}"
            )
        if self.moved:
            free = (self.canvas or 0) - DIGIT_SIDES[self.format]
            if self.moved > (reach := free - free // 2):
                raise ValueError(
                    f"moved: got {self.moved}, but a digit can move by {reach} pixels at most on a "
                    f"canvas of {self.canvas}"
                )
        if self.augment.pad > min(self.image_size):
            raise ValueError(
                f"augment.pad: got {self.augment.pad}, want at most the image's side of "
                f"{min(self.image_size)}"
            )
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels:
                raise ValueError(
                    f"{key}: got {len(getattr(self, key))} values, want {self.channels} (channels)"
                )
        least, most = SCALE
        if not all(value > 0 for value in self.std):
            raise ValueError(f"std: got {list(self.std)}, want values above 0")
        if not all(least <= value <= most for value in self.std):
            raise ValueError(f"std: got {list(self.std)}, want values from {least:g} to {most:g}")
        if not all(abs(value) <= most for value in self.mean):
            raise ValueError(f"mean: got {list(self.mean)}, want values up to {most:g}")
        return self
