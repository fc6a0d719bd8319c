"""Images of several handwritten digits, with the class of every pixel.

The digits are the 1,797 handwritten ones of 8×8 pixels in scikit-learn. A scene contains a few of
them, enlarged, at random positions, with random contrast, on an uneven and noisy background. Digits
may touch and slightly cover each other. A pixel with enough ink has the class of its digit; all
other pixels are background.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from translution.apps.data.digits import load_digits

__all__ = ["BACKGROUND", "CLASSES", "Parts", "Style", "batches", "draw", "load_parts"]

CLASSES = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "background")
BACKGROUND = 10
INK = 0.4  # the least ink, from 0 to 1, with which a pixel belongs to the digit
COVERED = 0.05  # the largest part of a digit's ink that each later digit may cover
TRIES = 20  # the number of positions that are tried for a digit before it is left out
VALIDATION = 240  # the number of digits for validation


@dataclass(frozen=True)
class Style:
    """How a scene is drawn.

    Attributes:
        canvas: pixels per side of a scene.
        digits: the largest number of digits in a scene.
        smallest, largest: pixels per side of a digit.
        noise: the standard deviation of the noise, where pixels are from 0 to 1.
    """

    canvas: int = 64
    digits: int = 5
    smallest: int = 24
    largest: int = 32
    noise: float = 0.06

    def __post_init__(self) -> None:
        for name in ("canvas", "digits", "smallest", "largest"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, want at least 1")
        if not 8 <= self.smallest <= self.largest <= self.canvas:
            raise ValueError(
                f"smallest, largest: got {self.smallest} and {self.largest}, want 8 <= smallest <= "
                f"largest <= the canvas of {self.canvas}"
            )
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise: got {self.noise}, want 0 to 1")


@dataclass(frozen=True)
class Parts:
    """Digits [n, 8, 8] and labels [n] for training, validation and test, which do not overlap."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_parts() -> Parts:
    """The library's split of the digits, with the last training digits used for validation."""
    data = load_digits()
    images, labels = data.train, data.train_labels
    return Parts(
        (images[:-VALIDATION], labels[:-VALIDATION]),
        (images[-VALIDATION:], labels[-VALIDATION:]),
        (data.test, data.test_labels),
    )


def draw(
    digits: Tensor, labels: Tensor, style: Style, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw a scene of these digits.

    A digit is left out if it would cover too much of another one at all positions that are tried.

    Args:
        digits, labels: digits [n, 8, 8] and their classes [n].
        style: sizes and noise.
        generator: the source of all random numbers.

    Returns:
        the image [1, canvas, canvas], and the class of each pixel [canvas, canvas].
    """

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    side = style.canvas
    uneven = torch.rand(1, 1, 3, 3, generator=generator) * between(0, 0.3) + between(0, 0.2)
    image = F.interpolate(uneven, (side, side), mode="bilinear", align_corners=True)[0, 0]
    # the number, from 1 to n, of the digit that is on top at each pixel
    owner = torch.zeros(side, side, dtype=torch.int64)
    drawn = torch.zeros(len(digits) + 1)
    for number, digit in enumerate(digits, 1):
        size = whole(style.smallest, style.largest)
        # strokes reach the edge of their 8×8 square, so add a margin
        ink = F.interpolate(F.pad(digit, (1, 1, 1, 1))[None, None], (size, size), mode="bicubic")
        ink = ink[0, 0].clamp(0, 1)
        inked = ink >= INK
        for _ in range(TRIES):
            top, left = whole(0, side - size), whole(0, side - size)
            here = (slice(top, top + size), slice(left, left + size))
            hidden = torch.bincount(owner[here][inked], minlength=number)[:number]
            if (hidden[1:] <= COVERED * drawn[1:number]).all():
                drawn[number] = inked.sum()
                # always brighter than the background, with a random contrast
                bright = float(image[here].mean()) + between(0.3, 0.7)
                image[here] = image[here] * (1 - ink) + bright * ink
                owner[here][inked] = number
                break
    image = image + style.noise * torch.randn(side, side, generator=generator)
    classes = torch.cat([torch.tensor([BACKGROUND]), labels])
    return image[None].clamp(0, 1), classes[owner]


def batches(
    part: tuple[Tensor, Tensor], style: Style, size: int, count: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw batches of scenes, which use all digits in random order before one is used again.

    Args:
        part: digits [n, 8, 8] and labels [n].
        style: how scenes are drawn.
        size: scenes per batch.
        count: the number of batches.
        seed: the seed of all random numbers.

    Yields:
        images [size, 1, canvas, canvas] and classes [size, canvas, canvas].
    """
    digits, labels = part
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    fewest = (style.digits + 1) // 2
    for _ in range(count):
        scenes = []
        for _ in range(size):
            n = int(torch.randint(fewest, style.digits + 1, (), generator=generator))
            while len(order) < n:
                order = torch.cat([order, torch.randperm(len(digits), generator=generator)])
            chosen, order = order[:n], order[n:]
            scenes.append(draw(digits[chosen], labels[chosen], style, generator))
        images, classes = zip(*scenes, strict=True)
        yield torch.stack(images), torch.stack(classes)
