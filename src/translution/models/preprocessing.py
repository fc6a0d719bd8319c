"""How an image becomes the input of a model, as a description that is saved with the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["PROCESSOR", "PROCESSOR_FILE", "RESAMPLING", "Preprocessing", "file_entries"]

# The file in which transformers looks for the class of an image processor, and its content. The
# class is in `translution.interop.image_processor` and reads the description from config.json.
PROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR = '{"image_processor_type": "TranslutionImageProcessor"}\n'
RESAMPLING = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of a model, and the names of the classes it is assigned to.

    An image is converted to grey or RGB. For a model of digits it is then placed on a canvas.
    Its centre is cut out and resized, and the values, from 0 to 1, are normalised with the mean and
    the standard deviation of each channel.

    Args:
        image_size: height and width of the model's input in pixels.
        channels: 1 (grey) or 3 (RGB).
        mean, std: per channel, for values from 0 to 1.
        crop: the share of the shorter side that is kept. An image that already has `image_size` is
            kept whole.
        resample: how an image is interpolated when it is resized, "bilinear" or "bicubic".
        digit_size, canvas: the side in pixels of a digit, and of the black canvas in whose centre
            it is placed. An image of another size is first resized to the digit's size, with its
            shape kept; only an image of the canvas's size stays as it is. None for models of other
            images.
        classes: the names of the classes in the order of the logits, or None if they have none.

    Raises:
        ValueError: a value that does not fit; the message names it.
    """

    image_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0
    resample: str = "bicubic"
    digit_size: int | None = None
    canvas: int | None = None
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("image_size", "mean", "std", "classes"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))  # JSON has no tuples
        size, canvas, digit = self.image_size, self.canvas, self.digit_size
        two = isinstance(size, tuple) and len(size) == 2 and all(map(_is_side, size))
        self._want("image_size", two, "a height and a width of at least 1")
        self._want("channels", _is_side(self.channels) and self.channels in (1, 3), "1 or 3")
        for name in ("mean", "std"):
            values = getattr(self, name)
            fits = isinstance(values, tuple) and len(values) == self.channels
            fits = fits and all(_is_finite(v) and (name == "mean" or v > 0) for v in values)
            more = "" if name == "mean" else " above 0"
            self._want(name, fits, f"{self.channels} finite numbers{more}, one per channel")
        self._want("crop", _is_finite(self.crop) and 0 < self.crop <= 1, "more than 0, at most 1")
        self._want("resample", self.resample in RESAMPLING, f"one of {list(RESAMPLING)}")
        self._want("canvas", canvas is None or _is_side(canvas), "a side of at least 1, or None")
        fits = digit is None if canvas is None else _is_side(digit) and digit <= canvas
        want = "None without a canvas" if canvas is None else f"1 to {canvas}, the canvas's side"
        self._want("digit_size", fits, want)
        names = self.classes
        texts = isinstance(names, tuple) and all(isinstance(name, str) for name in names)
        fits = names is None or texts
        self._want("classes", fits, "names, or None")

    def _want(self, name: str, fits: bool, want: str) -> None:
        if not fits:
            raise ValueError(f"preprocessing.{name}: got {getattr(self, name)!r}, want {want}")

    def to_dict(self) -> dict[str, Any]:
        """The description as values that JSON has, without those that are None."""
        values = dataclasses.asdict(self)
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, content: Any) -> Preprocessing:
        """The description that `to_dict` wrote.

        Raises:
            ValueError: it is not a dict, a key is missing or unknown, or a value does not fit; the
                message names the key.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"preprocessing: got {content!r}, want a dict")
        fields = dataclasses.fields(cls)
        known = [field.name for field in fields]
        for key in content:
            if key not in known:
                raise ValueError(f"preprocessing: got the key {key!r}, want one of {known}")
        for field in fields:
            if field.default is dataclasses.MISSING and field.name not in content:
                raise ValueError(f"preprocessing.{field.name}: is missing")
        return cls(**content)

    @classmethod
    def of_file(cls, content: Mapping[str, Any], source: Any, config: Any) -> Preprocessing | None:
        """The description in the content of a config.json or checkpoint.json, None without one.

        Args:
            content: the entries of the file. The names of the classes are in an entry of their own.
            source: the name of the file, for the error message.
            config: the configuration of the model, which the description must fit.

        Raises:
            ValueError: the description is wrong, or does not fit the model.
        """
        described = content.get("preprocessing")
        if described is None:
            return None
        try:
            found = cls.from_dict(described)
            if (classes := content.get("classes")) is not None:
                found = dataclasses.replace(found, classes=classes)
            found.check(config)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        return found

    def entry(self) -> dict[str, Any]:
        """The description for a file that has an entry of its own for the names of the classes."""
        return dataclasses.replace(self, classes=None).to_dict()

    def check(self, config: Any) -> None:
        """Check that a model with this configuration takes what the description makes.

        Raises:
            ValueError: the model takes another size or number of channels, has another number of
                classes, or takes no images.
        """
        if not hasattr(config, "in_channels"):
            raise ValueError("preprocessing: got one for images, but the model takes none")
        want = config.in_channels
        self._want("channels", self.channels == want, f"the model's {want}")
        size = getattr(config, "image_size", None)
        size = (size, size) if isinstance(size, int) else size
        fits = size is None or self.image_size == tuple(size)
        self._want("image_size", fits, f"the model's {size}")
        _check_classes(self.classes, config)


def file_entries(
    preprocessing: Preprocessing | None, classes: Sequence[str] | None, config: Any
) -> dict[str, Any]:
    """The entries of a config.json that `Preprocessing.of_file` reads.

    Args:
        preprocessing: the description, or None if there is none.
        classes: the names of the classes; None takes those of the description.
        config: the configuration of the model, which both must fit.

    Raises:
        ValueError: they do not fit the model.
    """
    entries: dict[str, Any] = {}
    if preprocessing is not None:
        classes = preprocessing.classes if classes is None else classes
        dataclasses.replace(preprocessing, classes=None).check(config)
        entries["preprocessing"] = preprocessing.entry()
    _check_classes(classes, config)
    return entries if classes is None else {"classes": list(classes)} | entries


def _check_classes(classes: Sequence[str] | None, config: Any) -> None:
    want = getattr(config, "num_classes", 0)
    if classes is not None and len(classes) != want:
        raise ValueError(f"classes: got {len(classes)} names, but the model has {want} classes")


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)
