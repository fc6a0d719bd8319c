"""Augmentation and normalisation of whole batches, on the device of the images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributions import Beta
from torch.nn.functional import one_hot, pad

from ..config import Options
from .rand_augment import RandAugmentOptions, rand_augment

__all__ = ["Augment", "AugmentOptions"]

ALPHA = (1e-3, 1e3)  # least and largest of the Beta distribution
ERASED = (0.02, 1 / 3)  # least and largest share of the area that is erased
STRETCH = (0.3, 3.3)  # least and largest ratio of its height to its width

Share = Annotated[float, Field(ge=0, le=1)]


class AugmentOptions(Options):
    """Random changes of training images. By default nothing is changed.

    resized_crop: the least and largest share of an image that is cut out and resized, such as
        [0.08, 1]. ratio: the least and largest stretch of that part. Both happen in the loader.
    pad: the image gets a black border of so many pixels, and is cut out of it again at random.
    flip: the probability of a mirror image.
    randaugment: [n, m] applies n operations to each image, at magnitude m of 30; or
        `RandAugmentOptions`.
    erasing: the probability that a rectangle is erased. erasing_fill: with the "mean" colour, or
        with "noise", which has the mean and deviation of the data.
    mixup, cutmix: alpha of the Beta distribution that the share of another image is drawn from,
        usually 0.8 and 1; 0 switches it off. If both are given, each batch draws one of them.
    mix: the probability that a batch is mixed at all.
    """

    resized_crop: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    pad: int = Field(default=0, ge=0, le=2**14)
    flip: Share = 0.0
    randaugment: RandAugmentOptions | None = None
    erasing: Share = 0.0
    erasing_fill: Literal["mean", "noise"] = "mean"
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    mix: Share = 1.0

    @model_validator(mode="after")
    def _check(self) -> AugmentOptions:
        if self.resized_crop and not 0 < self.resized_crop[0] <= self.resized_crop[1] <= 1:
            raise ValueError(
                f"resized_crop: got {list(self.resized_crop)}, want least and largest share of the "
                "area, above 0 and at most 1"
            )
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(
                f"ratio: got {list(self.ratio)}, want least and largest stretch, above 0"
            )
        least, most = ALPHA
        for name in ("mixup", "cutmix"):
            alpha = getattr(self, name)
            if alpha and not least <= alpha <= most:
                raise ValueError(f"{name}: got {alpha}, want 0, or from {least:g} to {most:g}")
        return self

    @property
    def mixes(self) -> bool:
        """Whether a target is a probability for each class instead of one class."""
        return bool(self.mix and (self.mixup or self.cutmix))


class Augment(nn.Module):
    """Prepares batches for a model: augments them in training mode, and always normalises them.

    All random numbers come from torch's global generator on the CPU, whatever the device of the
    images is. So equal seeds give equal changes on every device.

    Args:
        options: the random changes.
        classes: the number of classes.
        image_size: (height, width) in pixels.
        mean, std: per channel, for values from 0 to 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        options: AugmentOptions,
        classes: int,
        image_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.options = options
        self.classes = classes
        self.image_size = tuple(image_size)
        # not saved with the weights, because a checkpoint's configuration has them
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Augment and normalise a batch.

        Args:
            images: uint8 [batch, channels, height, width].
            labels: int64 [batch].

        Returns:
            The images, float32 of the same shape, and the targets: int64 [batch], or probabilities
            float32 [batch, classes] if images are mixed (only in training mode).

        Raises:
            ValueError: images of another dtype or shape, or another number of labels.
        """
        want = (len(self.mean), *self.image_size)
        if not len(images):  # `collate` does not know the shape of an empty batch
            images = images.new_zeros(0, *want)
        if images.dtype != torch.uint8 or images.shape[1:] != want or len(labels) != len(images):
            raise ValueError(
                f"images: got {images.dtype} {list(images.shape)} and {len(labels)} labels, want "
                f"torch.uint8 {['b', *want]} and b labels"
            )
        # half precision would round colours
        with torch.autocast(images.device.type, enabled=False):
            pixels = images.float() / 255
            targets = labels
            if self.training:
                pixels = self._changed(pixels)
                if self.options.mixes:
                    pixels, targets = self._mixed(pixels, one_hot(labels, self.classes).float())
            return (pixels - self.mean) / self.std, targets

    def _changed(self, pixels: Tensor) -> Tensor:
        options = self.options
        if options.pad:
            pixels = _shifted(pixels, options.pad)
        if options.flip:
            pixels = torch.where(_chosen(options.flip, pixels), pixels.flip(-1), pixels)
        if options.randaugment:
            pixels = rand_augment(pixels, options.randaugment, self.mean)
        if options.erasing:
            chosen = _chosen(options.erasing, pixels) & _rectangles(pixels)
            pixels = torch.where(chosen, self._filling(pixels), pixels)
        return pixels

    def _filling(self, pixels: Tensor) -> Tensor:
        """What erased pixels become."""
        if self.options.erasing_fill == "mean":
            return self.mean
        return self.mean + self.std * torch.randn(pixels.shape).to(pixels.device)

    def _mixed(self, pixels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mix each image with another one of the batch: all pixels (MixUp) or a box (CutMix)."""
        options = self.options
        mixed, cut = torch.rand(2).tolist()
        if mixed >= options.mix:
            return pixels, targets
        cuts = bool(options.cutmix) and (not options.mixup or cut < 0.5)
        alpha = options.cutmix if cuts else options.mixup
        share = Beta(torch.tensor(alpha), torch.tensor(alpha)).sample().item()
        other = torch.randperm(len(pixels)).to(pixels.device)
        if cuts:
            box, share = _cut(pixels.shape[-2], pixels.shape[-1], share)
            pixels = pixels.clone()
            pixels[..., box[0], box[1]] = pixels[other][..., box[0], box[1]]
        else:
            pixels = pixels.lerp(pixels[other], share)
        return pixels, targets.lerp(targets[other], share)


def _chosen(probability: float, pixels: Tensor) -> Tensor:
    """Choose each image with this probability: bool [batch, 1, 1, 1]."""
    return (torch.rand(len(pixels), 1, 1, 1) < probability).to(pixels.device)


def _shifted(pixels: Tensor, by: int) -> Tensor:
    """Add a border of zeros and cut each image out again at a random position."""
    b, _, h, w = pixels.shape
    places = torch.randint(2 * by + 1, (2, b, 1)).to(pixels.device)
    rows = places[0] + torch.arange(h, device=pixels.device)
    columns = places[1] + torch.arange(w, device=pixels.device)
    image = torch.arange(b, device=pixels.device)[:, None, None]
    # indexing moves the axis of channels to the end, because it lies between indices
    padded = pad(pixels, (by, by, by, by))
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _rectangles(pixels: Tensor) -> Tensor:
    """A random rectangle in each image: bool [batch, 1, height, width]."""
    b, _, h, w = pixels.shape
    area, stretch, y, x = torch.rand(4, b)
    area = h * w * (ERASED[0] + area * (ERASED[1] - ERASED[0]))
    low, high = math.log(STRETCH[0]), math.log(STRETCH[1])
    stretch = (low + stretch * (high - low)).exp()
    rows = (area * stretch).sqrt().round().clamp(1, h)
    columns = (area / stretch).sqrt().round().clamp(1, w)
    top, left = (y * (h - rows + 1)).floor(), (x * (w - columns + 1)).floor()

    def within(start: Tensor, length: Tensor, size: int) -> Tensor:
        places = torch.arange(size) - start[:, None]
        return (places >= 0) & (places < length[:, None])

    inside = within(top, rows, h)[:, :, None] & within(left, columns, w)[:, None, :]
    return inside[:, None].to(pixels.device)


def _cut(h: int, w: int, share: float) -> tuple[tuple[slice, slice], float]:
    """A box (rows, columns) of about this share of the area around a random centre, and its exact
    share after clipping at the border."""
    y, x = torch.rand(2).tolist()
    rows, columns = (
        slice(max(0, round(c * n - side * n / 2)), min(n, round(c * n + side * n / 2)))
        for c, n, side in ((y, h, math.sqrt(share)), (x, w, math.sqrt(share)))
    )
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return (rows, columns), area / (h * w)
