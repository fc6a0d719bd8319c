"""SAN (Zhao et al., patchwise), and ACmix-SAN: its 7×7 attention also feeds a convolution.

What is inferred about ACmix-SAN, `PatchwiseACmix2d` says. At 224×224:

    size                                 SAN-10 / 15 / 19        with ACmix
    parameters, M                        11.83 / 16.17 / 20.50   11.98 / 16.40 / 20.81
      in the paper                       11.8 / 16.2 / 20.5      12.1 / 16.6 / 21.2
    multiply-adds, G                     1.79 / 2.48 / 3.13      1.83 / 2.53 / 3.21
      counted as SAN's paper does        1.87 / 2.58 / 3.26      1.93 / 2.68 / 3.39
      in the paper                       1.9 / 2.6 / 3.3         1.9 / 2.7 / 3.4

SAN's paper also counts a bias as 1 per number, batch norm as 2, ReLU as 1, a pool as 1 per number
that goes in. With ACmix its count has the fc and the shifts as two steps, which run as one here.
Biases that a batch norm subtracts again (0.008 to 0.017 M) are left out of the models, not of that
count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..modules.acmix import ImageAttention
from ..modules.patchwise import PatchwiseACmix2d, PatchwiseAttention2d
from .backbone import Backbone
from .blocks import choose
from .vit import configure

__all__ = ["SAN", "SANS", "SANConfig", "san"]

# Blocks per stage (SAN, table 2).
SANS = {"10": (2, 1, 2, 4, 1), "15": (3, 2, 3, 5, 2), "19": (3, 3, 4, 6, 3)}

# Channels of the stages over those of the stem; of a block over those of its q and k, its values.
WIDTHS, RELATION, MIDDLE = (1, 4, 8, 16, 32), 16, 4


@dataclass
class SANConfig:
    """Everything that a `SAN` is made from.

    mixer: "attention" or "acmix". layers: blocks per stage, of which there are five. kernels: of
    the stages' attention; ACmix stands where they are larger than its convolution. width: channels
    of the stem and the first stage; the others have 4, 8, 16 and 32 times as many. share: channels
    that share an attention weight. conv_kernel, learned_shifts: as in PatchwiseACmix2d.
    """

    mixer: str = "acmix"
    layers: Sequence[int] = SANS["19"]
    kernels: Sequence[int] = (3, 7, 7, 7, 7)
    in_channels: int = 3
    num_classes: int = 1000
    width: int = 64
    share: int = 8
    conv_kernel: int = 3
    learned_shifts: bool = True
    features_only: bool = False

    def __post_init__(self) -> None:
        choose("mixer", self.mixer, ["attention", "acmix"])
        for name in ("layers", "kernels"):
            value = getattr(self, name)
            if len(value) != len(WIDTHS) or min(value) < 1:
                raise ValueError(f"{name}: got {value}, want five numbers of at least 1")
        for name in ("in_channels", "num_classes", "share"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, want at least 1")
        if self.width < 1 or self.width % RELATION:
            raise ValueError(f"width: got {self.width}, want a multiple of {RELATION}")

    def attention(self, channels: int, kernel: int) -> ImageAttention:
        """The attention of a block that is `channels` wide."""
        middle, relation = channels // MIDDLE, channels // RELATION
        if self.mixer == "attention" or kernel <= self.conv_kernel:
            return PatchwiseAttention2d(channels, middle, relation, self.share, kernel)
        # no bias on the convolution: the block's batch norm would subtract it
        return PatchwiseACmix2d(
            channels, middle, relation, self.share, kernel, self.conv_kernel,
            bias=False, learned_shifts=self.learned_shifts,
        )  # fmt: skip


class Block(nn.Module):
    """x + conv1×1(attention(x)), batch norm and ReLU before each; channels / 4 in the middle."""

    def __init__(self, channels: int, attention: ImageAttention):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.attention = attention
        self.norm2 = nn.BatchNorm2d(channels // MIDDLE)
        # no bias: every way out of a stage leads through a batch norm, which subtracts it
        self.conv = nn.Conv2d(channels // MIDDLE, channels, 1, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(self.relu(self.norm1(x)))
        return x + self.conv(self.relu(self.norm2(y)))


class Stage(nn.Module):
    """Half the resolution (rounded up), new width, blocks, batch norm and ReLU."""

    def __init__(self, in_channels: int, channels: int, blocks: Sequence[Block]):
        super().__init__()
        self.pool = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.blocks(self.conv(self.pool(x)))))


class SAN(Backbone):
    """Stem, five stages at strides 2 to 32, mean -> logits; or the last four stages' maps.

    As in SAN's code there is no convolution larger than 1×1, and torch's own initialisation.
    """

    def __init__(self, config: SANConfig):
        super().__init__()
        self.config = c = config
        self.in_channels, self.features_only = c.in_channels, c.features_only
        self.stem = nn.Sequential(
            nn.Conv2d(c.in_channels, c.width, 1, bias=False), nn.BatchNorm2d(c.width), nn.ReLU()
        )
        before, stages = c.width, []
        for times, depth, kernel in zip(WIDTHS, c.layers, c.kernels, strict=True):
            after = c.width * times
            blocks = [Block(after, c.attention(after, kernel)) for _ in range(depth)]
            stages.append(Stage(before, after, blocks))
            before = after
        self.stages = nn.ModuleList(stages)
        self.channels = tuple(c.width * times for times in WIDTHS[1:])
        if not c.features_only:
            self.head = nn.Linear(before, c.num_classes)

    def feature_maps(self, image: Tensor) -> list[Tensor]:
        x, maps = self.stem(image), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[1:]

    def classify(self, last: Tensor) -> Tensor:
        return self.head(last.mean((2, 3)))


def san(size: str = "19", mixer: str = "acmix", **overrides: Any) -> SAN:
    """A SAN of a named size ("10", "15", "19"); any field of `SANConfig` can be given.

    Raises:
        ValueError: an unknown size, mixer or field, or values that don't fit.
    """
    layers = SANS[choose("size", size, list(SANS))]
    return SAN(configure(SANConfig, **({"mixer": mixer, "layers": layers} | overrides)))
