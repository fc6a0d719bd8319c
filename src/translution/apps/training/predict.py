"""Classifying image files with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import parse
from ..data.augment import Augment
from ..data.images import load_image
from .checkpoints import Checkpoint
from .config import Config

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
    checkpoint: Checkpoint,
    files: Sequence[Path],
    top: int = 1,
    batch_size: int = 64,
    device: str = "cpu",
) -> Iterator[Prediction]:
    """Classify image files, in their order.

    Args:
        checkpoint: a classifier of images.
        files: the image files.
        top: the number of classes to give for each file.
        batch_size: the number of images that are classified at once.
        device: where the model runs.

    Yields:
        One prediction per file. For a file that cannot be read, its `error` says why.

    Raises:
        ValueError: the checkpoint is not a classifier of images, or its outputs are not finite.
    """
    config = parse(Config, checkpoint.config, str(checkpoint.path))
    if checkpoint.classes is None or config.data.kind != "images":
        raise ValueError(f"checkpoint: {checkpoint.path} is not a classifier of images")
    data, classes = config.data, checkpoint.classes
    augment = Augment(data.augment, len(classes), data.image_size, data.mean, data.std).eval()
    model, augment = checkpoint.model.to(device), augment.to(device)
    for first in range(0, len(files), batch_size):
        batch_files = files[first : first + batch_size]
        loaded = [_load(path, data) for path in batch_files]
        images = [image for image in loaded if isinstance(image, torch.Tensor)]
        likely: Iterator[Any] = iter(())
        if images:
            batch, _ = augment(torch.stack(images).to(device), torch.zeros(len(images)).long())
            logits = model(batch).float()
            if not logits.isfinite().all():
                raise ValueError(f"checkpoint: {checkpoint.path} gives values that are not finite")
            best = logits.softmax(-1).topk(min(top, len(classes)))
            likely = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        for path, image in zip(batch_files, loaded, strict=True):
            if isinstance(image, str):
                yield Prediction(path, [], [], image)
            else:
                values, indices = next(likely)
                yield Prediction(path, [classes[i] for i in indices], values)


def _load(path: Path, options: Any) -> torch.Tensor | str:
    """An image, or why it could not be read."""
    try:
        return load_image(path, options)
    except (ValueError, OSError) as error:
        return str(error)
