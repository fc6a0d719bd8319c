"""What image backbones share: logits, or the maps that detection and segmentation use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .pretrained import Pretrained

__all__ = ["Backbone", "ChannelNorm", "DropPath", "drop_rates", "truncated"]


class Backbone(Pretrained):
    """An image classifier in stages, whose maps can be had instead of its logits.

    Subclasses set `channels` and `strides`, and implement `feature_maps` and `classify`. With
    `features_only` they make no head.

    Attributes:
        in_channels: of the image.
        channels: of each map, first to last.
        strides: pixels of the image per place of each map: 4, 8, 16, 32.
        features_only: whether calling the model returns the maps.
    """

    in_channels: int
    channels: tuple[int, ...]
    strides: tuple[int, ...] = (4, 8, 16, 32)
    features_only: bool = False

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """image [batch, in_channels, height, width] -> logits [batch, num_classes], or with
        `features_only` the maps [batch, channels, height / stride, width / stride] (rounded up).

        Raises:
            ValueError: an image of another shape.
        """
        image = self.checked(image)
        return self.feature_maps(image) if self.features_only else self.logits(image)

    def checked(self, image: Tensor) -> Tensor:
        """The image, if it is one of this model's."""
        if image.ndim != 4 or image.shape[1] != self.in_channels:
            raise ValueError(
                f"image: got shape {tuple(image.shape)}, want (batch, {self.in_channels}, height, "
                "width)"
            )
        return image

    def logits(self, image: Tensor) -> Tensor:
        """Without `features_only`: from the last map, unless a model has more than its maps."""
        return self.classify(self.feature_maps(image)[-1])

    def feature_maps(self, image: Tensor) -> list[Tensor]:
        """The maps at the four strides."""
        raise NotImplementedError

    def classify(self, last: Tensor) -> Tensor:
        """Logits from the last map."""
        raise NotImplementedError


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each place: [batch, channels, height, width] in and out."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DropPath(nn.Module):
    """In training, zeros a residual branch for a random `rate` of the samples and scales the
    others up (stochastic depth)."""

    def __init__(self, rate: float):
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop_path: got {rate}, want at least 0 and less than 1")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < keep
        return x * (kept.to(x.dtype) / keep)

    def extra_repr(self) -> str:
        return f"{self.rate:.3g}"


def drop_rates(last: float, depth: int) -> list[float]:
    """Rates of `DropPath` for the blocks of a model: from 0 to `last`, linearly."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]


def truncated(*layers: nn.Module) -> None:
    """Start these layers as transformers of images do: normal weights of 0.02, no biases."""
    for layer in layers:
        nn.init.trunc_normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
