"""The preprocessing of a model as an image processor of Hugging Face's transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images, to_numpy_array

from ..models.preprocessing import Preprocessing
from ..models.pretrained import Pretrained
from .images import normalised, prepare

__all__ = ["BACKENDS", "TranslutionImageProcessor", "entries_of", "take_entries"]


class TranslutionImageProcessor(BaseImageProcessor):
    """Makes pixel_values of images, as the model's preprocessing describes.

    `from_pretrained` reads what its own `save_pretrained` wrote, and otherwise the description in
    the config.json of a model's folder.

    Args:
        preprocessing: the description, or the dict that its `to_dict` returns.

    Raises:
        ValueError: the description is missing or wrong.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(self, preprocessing: Preprocessing | dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        if not isinstance(preprocessing, Preprocessing):
            preprocessing = Preprocessing.from_dict(preprocessing)
        self.preprocessing = preprocessing

    def preprocess(
        self, images: Any, return_tensors: str | None = "pt", **others: Any
    ) -> BatchFeature:
        """
        Args:
            images: an image or a list of them: of Pillow, arrays, tensors, paths or addresses.
            return_tensors: "pt" for a tensor, "np" for an array.

        Returns:
            pixel_values, float32 [images, channels, height, width].

        Raises:
            ValueError: another argument, or an image of 32 bits per value.
        """
        if unknown := [name for name, value in others.items() if value is not None]:
            raise ValueError(f"{unknown[0]}: the preprocessing of this model is fixed")
        flat: Any = make_flat_list_of_images(self.fetch_images(images))
        pixels = [prepare(_pillow(image), self.preprocessing) for image in flat]
        values = normalised(torch.stack(pixels), self.preprocessing)
        return BatchFeature({"pixel_values": values}, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        return {
            "image_processor_type": type(self).__name__,
            "preprocessing": self.preprocessing.to_dict(),
        }

    @staticmethod
    def described_by(config: Any) -> Preprocessing | None:
        """The preprocessing in a configuration of transformers, None if it has none.

        The names of the classes are those of `id2label`, unless transformers made them up.
        """
        described = getattr(config, "preprocessing", None)
        if described is None:
            return None
        names = tuple(str(config.id2label[label]) for label in sorted(config.id2label))
        own = any(name != f"LABEL_{label}" for label, name in enumerate(names))
        return replace(Preprocessing.from_dict(described), classes=names if own else None)

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments that a folder or a repository describes, and unused keyword arguments."""
        source = pretrained_model_name_or_path
        content, rest = super().get_image_processor_dict(source, **kwargs)
        if "preprocessing" in content:
            return content, rest
        kwargs["image_processor_filename"] = "config.json"
        content, rest = super().get_image_processor_dict(source, **kwargs)
        described = content.get("preprocessing")
        if not isinstance(described, Mapping):
            raise ValueError(
                f"{source}: its config.json has no preprocessing, want a folder with one, which "
                "'translution share' writes"
            )
        if (classes := content.get("classes")) is not None:
            described = {**described, "classes": classes}
        return {"preprocessing": described}, rest


BACKENDS: dict[str, type] = dict.fromkeys(("pil", "torchvision"), TranslutionImageProcessor)
"""The processor for each backend of transformers: Pillow prepares images whichever is chosen."""


def entries_of(model: Pretrained) -> dict[str, Any]:
    """The entries of a configuration of transformers that a model's preprocessing makes."""
    known = model.preprocessing
    return {} if known is None else {"preprocessing": known.to_dict()}


def take_entries(config: Any, entries: dict[str, Any]) -> None:
    """Take the entries that only a config.json of this library has.

    The names of the classes become the configuration's `id2label`, unless it has one or is for
    another number of labels; the entry `preprocessing` is checked, and keeps the rest.

    Args:
        config: a configuration of transformers.
        entries: the entries that are not its attributes. Those of this library are removed.

    Raises:
        ValueError: the preprocessing is wrong.
    """
    classes = entries.pop("classes", None)
    for name in ("format", "translution"):
        entries.pop(name, None)
    if (described := getattr(config, "preprocessing", None)) is not None:
        preprocessing = Preprocessing.from_dict(described)
        classes = classes or preprocessing.classes
        config.preprocessing = preprocessing.entry()
    if config.id2label is None and classes and entries.get("num_labels") in (None, len(classes)):
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: label for label, name in config.id2label.items()}


def _pillow(image: Any) -> Image.Image:
    """An image of any kind as an upright one of Pillow."""
    if not isinstance(image, Image.Image):
        values = to_numpy_array(image)
        image = to_pil_image(values[None] if values.ndim == 2 else values)
    return ImageOps.exif_transpose(image)
