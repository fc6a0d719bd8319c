"""Which class a checkpoint gives to image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.augment import Augment
from ..data.images import load_image
from .checkpoints import Checkpoint
from .config import Config

__all__ = ["Prediction", "predict"]


class Prediction(NamedTuple):
    """The likeliest classes of a file and their probabilities; or why it could not be read."""

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
    """Classify the files, in their order.

    Args:
        top: how many classes of each.

    Raises:
        ValueError: the checkpoint is no classifier of images.
    """
    config = Config.model_validate(checkpoint.config)
    if checkpoint.classes is None or config.data.kind != "images":
        raise ValueError(f"checkpoint: {checkpoint.path} is not a classifier of images")
    data, classes = config.data, checkpoint.classes
    augment = Augment(data.augment, len(classes), data.image_size, data.mean, data.std).eval()
    model, augment = checkpoint.model.to(device), augment.to(device)
    for first in range(0, len(files), batch_size):
        some = files[first : first + batch_size]
        read = [_read(path, data) for path in some]
        images = [image for image in read if isinstance(image, torch.Tensor)]
        likely: Iterator[Any] = iter(())
        if images:
            batch, _ = augment(torch.stack(images).to(device), torch.zeros(len(images)).long())
            found = model(batch).float().softmax(-1).topk(min(top, len(classes)))
            likely = zip(found.values.tolist(), found.indices.tolist(), strict=True)
        for path, image in zip(some, read, strict=True):
            if isinstance(image, str):
                yield Prediction(path, [], [], image)
            else:
                values, indices = next(likely)
                yield Prediction(path, [classes[i] for i in indices], values)


def _read(path: Path, options: Any) -> torch.Tensor | str:
    try:
        return load_image(path, options)
    except (ValueError, OSError) as error:
        return str(error)
