"""ResNet, and ACmix-ResNet: every middle 3×3 convolution becomes attention and convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..modules.local import ACmix2d
from .backbone import Backbone
from .blocks import choose
from .vit import configure

__all__ = ["RESNETS", "ResNet", "ResNetConfig", "resnet"]

# Blocks per stage (ACmix, section 5.1; 26 and 38 as in stand-alone self-attention).
RESNETS = {"26": (1, 2, 4, 1), "38": (2, 3, 5, 2), "50": (3, 4, 6, 3)}


@dataclass
class ResNetConfig:
    """Everything that a `ResNet` is made from.

    mixer: what stands in the middle of a bottleneck, "convolution" (3×3) or "acmix". layers: blocks
    per stage. width: channels of the stem, and of the first stage's bottlenecks; they double from
    stage to stage. expansion: channels out of a block over its bottleneck's. heads,
    attention_kernel, conv_kernel, learned_shifts, published: as in ACmix2d.
    """

    mixer: str = "acmix"
    layers: Sequence[int] = RESNETS["50"]
    in_channels: int = 3
    num_classes: int = 1000
    width: int = 64
    expansion: int = 4
    heads: int = 4
    attention_kernel: int = 7
    conv_kernel: int = 3
    learned_shifts: bool = True
    published: bool = False
    features_only: bool = False

    def __post_init__(self) -> None:
        choose("mixer", self.mixer, ["convolution", "acmix"])
        if len(self.layers) != 4 or min(self.layers) < 1:
            raise ValueError(f"layers: got {self.layers}, want four numbers of at least 1")
        for name in ("in_channels", "num_classes", "width", "expansion"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, want at least 1")

    def middle(self, channels: int, stride: int) -> nn.Module:
        """What a bottleneck has between its two 1×1 convolutions."""
        if self.mixer == "convolution":
            padding = self.conv_kernel // 2
            return nn.Conv2d(
                channels, channels, self.conv_kernel, stride, padding, bias=False
            )  # fmt: skip
        return ACmix2d(
            channels, channels, self.heads, self.attention_kernel, self.conv_kernel, stride,
            learned_shifts=self.learned_shifts, published=self.published,
        )  # fmt: skip


class Bottleneck(nn.Module):
    """x + conv1×1(middle(conv1×1(x))), each followed by batch norm; the stride is in the middle."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        out_channels: int,
        stride: int,
        middle: Callable[[int, int], nn.Module],
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = middle(channels, stride)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        for conv in (self.conv1, self.conv2, self.conv3):
            # the general initialisation is for convolutions; ACmix starts its own parts itself
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.relu(self.norm2(self.conv2(y)))
        return self.relu(self.shortcut(x) + self.norm3(self.conv3(y)))


class ResNet(Backbone):
    """Stem, four stages of bottlenecks, mean -> logits; or the stages' maps."""

    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.config = c = config
        self.in_channels, self.features_only = c.in_channels, c.features_only
        self.stem = nn.Sequential(
            nn.Conv2d(c.in_channels, c.width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(c.width),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )
        before, stages = c.width, []
        for i, depth in enumerate(c.layers):
            channels = c.width * 2**i
            after = channels * c.expansion
            blocks = []
            for j in range(depth):
                stride = 2 if i and not j else 1
                blocks.append(Bottleneck(before, channels, after, stride, c.middle))
                before = after
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.channels = tuple(c.width * 2**i * c.expansion for i in range(4))
        if not c.features_only:
            self.head = nn.Linear(before, c.num_classes)

    def feature_maps(self, image: Tensor) -> list[Tensor]:
        x, maps = self.stem(image), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def classify(self, last: Tensor) -> Tensor:
        return self.head(last.mean((2, 3)))


def resnet(size: str = "50", mixer: str = "acmix", **overrides: Any) -> ResNet:
    """A ResNet of a named size ("26", "38", "50"); any field of `ResNetConfig` can be given.

    Raises:
        ValueError: an unknown size, mixer or field, or values that don't fit.
    """
    layers = RESNETS[choose("size", size, list(RESNETS))]
    return ResNet(configure(ResNetConfig, **({"mixer": mixer, "layers": layers} | overrides)))
