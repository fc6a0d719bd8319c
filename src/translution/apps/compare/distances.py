"""Measure accuracy by the distance that digits were moved, and show digits as models see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.augment import Augment
from ..data.digits import Ring, place, rings
from ..data.images import ImageOptions, Images
from ..experiments.config import Run
from ..experiments.costs import data_of
from ..training.checkpoints import open_checkpoint
from ..training.config import Config
from ..training.devices import pick_device

__all__ = ["accuracy_by_distance", "as_seen", "canvas_of", "held_out"]

BATCH = 256


def canvas_of(config: Config) -> int:
    """Return the number of pixels per side of the canvas."""
    assert isinstance(config.data, ImageOptions)
    assert config.data.canvas is not None
    return config.data.canvas


def held_out(config: Config) -> tuple[Tensor, Tensor]:
    """Return the test digits, uint8 [n, height, width], and their labels, int64 [n]."""
    part = data_of(config).part("test")
    assert isinstance(part, Images)
    return part._source.images[part._rows], part.labels


def as_seen(config: Config, digits: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Place digits on the canvas.

    Args:
        config: the configuration of a run.
        digits: uint8 [n, height, width].
        places: int64 [n, 2], the row and column of the upper left pixel of each digit.

    Returns:
        Images with values from 0 to 1, and the same images normalised for the model; both are
        float32 [n, 1, canvas, canvas].
    """
    options = config.data
    assert isinstance(options, ImageOptions)
    images = place(digits, canvas_of(config), places)
    normalise = Augment(options.augment, 10, options.image_size, options.mean, options.std).eval()
    return images / 255, normalise(images, torch.zeros(len(images), dtype=torch.int64))[0]


@torch.inference_mode()
def accuracy_by_distance(checkpoint: Path, run: Run) -> dict[str, Any]:
    """Measure the accuracy of a checkpoint on all test digits, for each ring of places.

    A ring contains the places at about the same distance from the centre. Each digit is tested at
    one place of each ring, which is the same for every model, and all places of a ring are used
    about equally often.

    Args:
        checkpoint: the folder of the checkpoint.
        run: the run that made it.

    Returns:
        "by_distance": for each ring the smallest and the largest distance in pixels ("from", "to"),
        its fraction of all places ("share"), and the "accuracy".
    """
    device = pick_device(run.config.train.device)
    model = open_checkpoint(checkpoint).model.to(device)
    digits, labels = held_out(run.config)
    generator = torch.Generator().manual_seed(0)
    found = []
    for ring in rings(digits.shape[-1], canvas_of(run.config)):
        places, right = _spread(ring, len(digits), generator), 0
        for chosen in torch.arange(len(digits)).split(BATCH):
            _, images = as_seen(run.config, digits[chosen], places[chosen])
            right += int((model(images.to(device)).argmax(1).cpu() == labels[chosen]).sum())
        found.append(
            {
                "from": ring.first, "to": ring.last, "share": ring.share,
                "accuracy": right / len(digits),
            }
        )  # fmt: skip
    return {"by_distance": found}


def _spread(ring: Ring, n: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(n, generator=generator)
    shuffled = ring.places[torch.randperm(len(ring.places), generator=generator)]
    return shuffled[order % len(shuffled)]
