"""Classifying image files with a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...interop.images import normalised
from ...models.preprocessing import Preprocessing
from ...models.pretrained import Pretrained
from ..data.images import load_image
from .checkpoints import Checkpoint

__all__ = ["Prediction", "predict"]


class Prediction(NamedTuple):
    """The most likely classes of an image file.

    file: the file.
    classes, probabilities: the most likely first.
    error: why the file could not be read, or None.
    """

    file: Path
    classes: list[str]
    probabilities: list[float]
    error: str | None = None


@torch.inference_mode()
def predict(
    checkpoint: Checkpoint | Pretrained,
    files: Sequence[Path],
    top: int = 1,
    batch_size: int = 64,
    device: str = "cpu",
) -> Iterator[Prediction]:
    """Classify image files, in their order.

    Args:
        checkpoint: a classifier of images, from `open_checkpoint` or `from_pretrained`. Its
            preprocessing says what is done to an image.
        files: the image files.
        top: the number of classes to give for each file.
        batch_size: the number of images that are classified at once.
        device: where the model runs.

    Yields:
        One prediction per file. For a file that cannot be read, its `error` says why.

    Raises:
        ValueError: the model is not a classifier of images, has no preprocessing, or its outputs
            are not finite.
    """
    model: Any = checkpoint.model if isinstance(checkpoint, Checkpoint) else checkpoint
    name = str(checkpoint.path) if isinstance(checkpoint, Checkpoint) else "the model"
    if getattr(model, "task", None) != "image-classification":
        raise ValueError(f"checkpoint: {name} is not a classifier of images")
    preprocessing: Preprocessing | None = model.preprocessing
    if preprocessing is None:
        raise ValueError(
            f"checkpoint: {name} was saved without the preprocessing of images that fits it; want "
            "a run, a folder of 'translution share', or one of save_pretrained with preprocessing"
        )
    classes = preprocessing.classes or tuple(map(str, range(model.config.num_classes)))
    model = model.to(device)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for first in range(0, len(files), batch_size):
        batch_files = files[first : first + batch_size]
        loaded = [_load(path, preprocessing) for path in batch_files]
        images = [image for image in loaded if isinstance(image, torch.Tensor)]
        likely: Iterator[Any] = iter(())
        if images:
            batch = normalised(torch.stack(images).to(device), preprocessing).to(dtype)
            logits = model(batch).float()
            if not logits.isfinite().all():
                raise ValueError(f"checkpoint: {name} gives values that are not finite")
            best = logits.softmax(-1).topk(min(top, len(classes)))
            likely = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        for path, image in zip(batch_files, loaded, strict=True):
            if isinstance(image, str):
                yield Prediction(path, [], [], image)
            else:
                values, indices = next(likely)
                yield Prediction(path, [classes[i] for i in indices], values)


def _load(path: Path, preprocessing: Preprocessing) -> torch.Tensor | str:
    """An image, or why it could not be read."""
    try:
        return load_image(path, preprocessing)
    except (ValueError, OSError) as error:
        return str(error)
