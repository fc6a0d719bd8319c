"""Images of several handwritten digits, with the class of every pixel.

The digits are the 1,797 real ones of 8×8 pixels that scikit-learn ships. Some of them are scaled
up, put on a canvas at random places and drawn with random contrast on an uneven, noisy background.
They may touch, and cover a little of each other. A pixel with enough ink has its digit's class, all
others are background.
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
INK = 0.4  # from this much ink on, of 1, a pixel belongs to the digit
COVERED = 0.05  # of the ink of a digit, at most so much may be covered by each later one
TRIES = 20  # places tried for a digit before it is left out
VALIDATION = 240  # digits


@dataclass(frozen=True)
class Style:
    """How a scene is drawn: sizes in pixels, of the canvas and of a digit's square."""

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
    """Digits [n, 8, 8] and labels [n] to train, validate and test with; none is in two of them."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_parts() -> Parts:
    """The library's split, with the end of its training digits put aside for validation."""
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
    """An image [1, canvas, canvas] of these digits and the class [canvas, canvas] of each pixel.

    A digit that would cover too much of another wherever it was tried is left out.
    """

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    side = style.canvas
    uneven = torch.rand(1, 1, 3, 3, generator=generator) * between(0, 0.3) + between(0, 0.2)
    image = F.interpolate(uneven, (side, side), mode="bilinear", align_corners=True)[0, 0]
    # which digit, 1 to n, is on top at a pixel
    owner = torch.zeros(side, side, dtype=torch.int64)
    drawn = torch.zeros(len(digits) + 1)
    for number, digit in enumerate(digits, 1):
        size = whole(style.smallest, style.largest)
        # strokes reach the edge of their 8×8 square, and would look cut off without a margin
        ink = F.interpolate(F.pad(digit, (1, 1, 1, 1))[None, None], (size, size), mode="bicubic")
        ink = ink[0, 0].clamp(0, 1)
        inked = ink >= INK
        for _ in range(TRIES):
            top, left = whole(0, side - size), whole(0, side - size)
            here = (slice(top, top + size), slice(left, left + size))
            hidden = torch.bincount(owner[here][inked], minlength=number)[:number]
            if (hidden[1:] <= COVERED * drawn[1:number]).all():
                drawn[number] = inked.sum()
                # brighter than the background in any case, by a contrast of its own
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
    """`count` batches of `size` scenes: images [size, 1, canvas, canvas] and classes.

    They go through the digits in a new order each time around. The seed decides everything.
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
            some, order = order[:n], order[n:]
            scenes.append(draw(digits[some], labels[some], style, generator))
        images, classes = zip(*scenes, strict=True)
        yield torch.stack(images), torch.stack(classes)
