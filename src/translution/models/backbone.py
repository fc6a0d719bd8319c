"""What image backbones share: logits, or the maps that detection and segmentation use."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Backbone"]


class Backbone(nn.Module):
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
        `features_only` the maps [batch, channels, height / stride, width / stride] (rounded up)."""
        if image.ndim != 4 or image.shape[1] != self.in_channels:
            raise ValueError(
                f"image: got shape {tuple(image.shape)}, want (batch, {self.in_channels}, height, "
                "width)"
            )
        maps = self.feature_maps(image)
        return maps if self.features_only else self.classify(maps[-1])

    def feature_maps(self, image: Tensor) -> list[Tensor]:
        """The maps at the four strides."""
        raise NotImplementedError

    def classify(self, last: Tensor) -> Tensor:
        """Logits from the last map."""
        raise NotImplementedError
