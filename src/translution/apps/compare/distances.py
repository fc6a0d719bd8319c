"""Accuracy by how far digits were moved, and digits as a model sees them."""

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
from ..training.engine import pick_device

__all__ = ["accuracy_by_distance", "as_seen", "canvas_of", "held_out"]

BATCH = 256


def canvas_of(config: Config) -> int:
    """Pixels per side of the canvas."""
    assert isinstance(config.data, ImageOptions)
    assert config.data.canvas is not None
    return config.data.canvas


def held_out(config: Config) -> tuple[Tensor, Tensor]:
    """The digits of the test part, uint8 [n, h, w], and their labels, int64 [n]."""
    part = data_of(config).part("test")
    assert isinstance(part, Images)
    return part._source.images[part._rows], part.labels


def as_seen(config: Config, digits: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Digits on the canvas, float32 [n, 1, canvas, canvas]: from 0 to 1, and as models take them.

    digits: uint8 [n, h, w]. places: int64 [n, 2], where the upper left pixel of each goes.
    """
    options = config.data
    assert isinstance(options, ImageOptions)
    images = place(digits, canvas_of(config), places)
    normalise = Augment(options.augment, 10, options.image_size, options.mean, options.std).eval()
    return images / 255, normalise(images, torch.zeros(len(images), dtype=torch.int64))[0]


@torch.inference_mode()
def accuracy_by_distance(checkpoint: Path, run: Run) -> dict[str, Any]:
    """The accuracy of a checkpoint on all held-out digits, once in every ring of places.

    Each digit takes one place of each ring, the same ones for every model, and each place is taken
    about equally often.

    Returns:
        "by_distance": for each ring the least and the largest distance in pixels ("from", "to"),
        its part of all places ("share"), and the "accuracy".
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
