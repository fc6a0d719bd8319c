"""What all image backbones share: they return logits, or feature maps for dense prediction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..modules.checks import check_tensor
from .pretrained import Pretrained

__all__ = [
    "Backbone",
    "ChannelNorm",
    "DropPath",
    "RecomputedBlock",
    "drop_path_rates",
    "init_truncated_normal",
]


class RecomputedBlock(nn.Module):
    """A block that can be computed again in the backward pass, and then stores only its input.

    Attributes:
        activation_checkpointing: "none", or "full" for that.
    """

    activation_checkpointing: str = "none"

    def __call__(self, *arguments: Any) -> Tensor:
        stores = self.activation_checkpointing == "none"
        if stores or not (self.training and torch.is_grad_enabled()):
            return super().__call__(*arguments)
        return checkpoint(super().__call__, *arguments, use_reentrant=False)


class Backbone(Pretrained):
    """An image classifier in stages that can return its feature maps instead of logits.

    Subclasses set `channels` and `strides`, and implement `feature_maps` and `classify`. With
    `features_only` they have no head.

    Attributes:
        in_channels: channels of the image.
        channels: channels of each feature map, from the first to the last.
        strides: pixels of the image per position of each feature map, such as (4, 8, 16, 32).
        features_only: whether calling the model returns the feature maps.
    """

    in_channels: int
    channels: tuple[int, ...]
    strides: tuple[int, ...] = (4, 8, 16, 32)
    features_only: bool = False
    head: nn.Module

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Logits [batch, num_classes], or with `features_only` the list of feature maps.

        Args:
            image: [batch, in_channels, height, width].

        Returns:
            the logits; or feature maps [batch, channels, height / stride, width / stride], with
            sizes rounded up.

        Raises:
            ValueError: the image has another shape.
        """
        image = self.checked(image)
        return self.feature_maps(image) if self.features_only else self.logits(image)

    def checked(self, image: Tensor) -> Tensor:
        """Return the image.

        Raises:
            ValueError: it is no tensor, has another number of axes or channels, or has no pixels.
        """
        wanted = f"(batch, {self.in_channels}, height, width)"
        check_tensor("image", image, wanted)
        fits = image.ndim == 4 and image.shape[1] == self.in_channels
        if not fits or min(image.shape[2:]) < 1:
            raise ValueError(
                f"image: got shape {tuple(image.shape)}, want {wanted}, each of at least 1"
            )
        return image

    def logits(self, image: Tensor) -> Tensor:
        """The logits [batch, num_classes], by default from the last feature map."""
        return self.classify(self.feature_maps(image)[-1])

    def recompute_blocks(self, enable: bool = True) -> None:
        """In training, compute the blocks again in the backward pass instead of storing what is
        inside them.

        Raises:
            ValueError: the blocks have batch norms, which would count each batch twice.
        """
        blocks = [block for block in self.modules() if isinstance(block, RecomputedBlock)]
        if enable and not blocks:
            raise ValueError(
                f"activation checkpointing: got {type(self).__name__}, whose batch norms would "
                "count each batch twice; want a ViT, Swin or PVT, or smaller batches that "
                "accumulate gradients"
            )
        for block in blocks:
            block.activation_checkpointing = "full" if enable else "none"

    def feature_maps(self, image: Tensor) -> list[Tensor]:
        """The feature maps, one per entry of `strides`."""
        raise NotImplementedError

    def classify(self, last: Tensor) -> Tensor:
        """The logits from the last feature map: the head, applied to the mean over positions."""
        return self.head(last.mean((2, 3)))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position of a map [batch, channels, height, width]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DropPath(nn.Module):
    """Stochastic depth: in training, set a residual branch to zero for some of the samples.

    Args:
        rate: the probability for each sample. The branch of the others is scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float):
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop_path_rate: got {rate}, want at least 0 and less than 1")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < keep
        return x * (kept.to(x.dtype) / keep)

    def extra_repr(self) -> str:
        return f"{self.rate:.3g}"


def drop_path_rates(last: float, depth: int) -> list[float]:
    """The rate of `DropPath` for each block of a model, rising linearly from 0 to `last`."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]


def init_truncated_normal(*layers: nn.Module) -> None:
    """Initialise layers as vision transformers do: weights from a truncated normal distribution
    with standard deviation 0.02, and biases of zero."""
    for layer in layers:
        nn.init.trunc_normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
