"""SAN (Zhao et al., the patchwise form), and ACmix-SAN, whose 7×7 attention gains a convolution.

ACmix-SAN is a reconstruction, which `PatchwiseACmix2d` explains. At 224×224:

    size                                 SAN-10 / 15 / 19        with ACmix
    parameters, M                        11.83 / 16.17 / 20.50   11.98 / 16.40 / 20.81
      in the paper                       11.8 / 16.2 / 20.5      12.1 / 16.6 / 21.2
    multiply-adds, G                     1.79 / 2.48 / 3.13      1.83 / 2.53 / 3.21
      counted as SAN's paper does        1.87 / 2.58 / 3.26      1.93 / 2.68 / 3.39
      in the paper                       1.9 / 2.6 / 3.3         1.9 / 2.7 / 3.4

SAN's paper also counts 1 per number for a bias, 2 for batch norm, 1 for ReLU and 1 per input of a
pool. Counted that way, ACmix has fc and the shifts as two steps; here they are computed as one. The
models have no biases that a batch norm would subtract (0.008 to 0.017 M parameters), but the counts
include them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .._renamed import current_arguments, renamed_arguments
from ..modules.convolution_path import ImageAttention
from ..modules.patchwise import PatchwiseACmix2d, PatchwiseAttention2d
from .backbone import Backbone
from .configuration import check_choice, check_positive, configure
from .registry import register_family, register_model

__all__ = ["SAN", "SANS", "SANConfig", "san"]

# The number of blocks per stage (SAN, table 2).
SANS = {"10": (2, 1, 2, 4, 1), "15": (3, 2, 3, 5, 2), "19": (3, 3, 4, 6, 3)}

# The channels of each stage as a multiple of the stem's, and the channels of a block as a multiple
# of those of its q and k (RELATION) and of its values (MIDDLE).
MULTIPLES, RELATION, MIDDLE = (1, 4, 8, 16, 32), 16, 4


@renamed_arguments(
    layers="depths",
    kernels="kernel_sizes",
    width="dim",
    share="group_size",
    conv_kernel="conv_kernel_size",
)
@dataclass
class SANConfig:
    """All options of a `SAN`.

    Args:
        mixer: "attention" or "acmix".
        depths: the number of blocks per stage (five stages).
        kernel_sizes: the kernel size of the attention in each stage. ACmix is used in the stages
            where it is larger than the kernel of the convolution.
        in_channels: channels of the image.
        num_classes: the number of logits.
        dim: channels of the stem and the first stage. The other stages have 4, 8, 16 and 32 times
            as many.
        group_size: the number of channels that share an attention weight.
        conv_kernel_size, learned_shifts: as in `PatchwiseACmix2d`.
        features_only: whether the model returns feature maps instead of logits.

    Raises:
        ValueError: naming the option, what came and what is wanted.
    """

    mixer: str = "attention"
    depths: Sequence[int] = SANS["19"]
    kernel_sizes: Sequence[int] = (3, 7, 7, 7, 7)
    in_channels: int = 3
    num_classes: int = 1000
    dim: int = 64
    group_size: int = 8
    conv_kernel_size: int = 3
    learned_shifts: bool = True
    features_only: bool = False

    def __post_init__(self) -> None:
        check_choice("mixer", self.mixer, ["attention", "acmix"])
        for name in ("depths", "kernel_sizes"):
            value = getattr(self, name)
            if len(value) != len(MULTIPLES) or min(value) < 1:
                raise ValueError(f"{name}: got {value}, want five numbers of at least 1")
        check_positive(self, "in_channels", "num_classes", "group_size")
        if self.dim < 1 or self.dim % RELATION:
            raise ValueError(f"dim: got {self.dim}, want a multiple of {RELATION}")

    def attention(self, channels: int, kernel_size: int) -> ImageAttention:
        """The attention of a block with so many channels."""
        middle, relation = channels // MIDDLE, channels // RELATION
        if self.mixer == "attention" or kernel_size <= self.conv_kernel_size:
            return PatchwiseAttention2d(channels, middle, relation, self.group_size, kernel_size)
        # The convolution has no bias, because the batch norm of the block would subtract it.
        return PatchwiseACmix2d(
            channels, middle, relation, self.group_size, kernel_size, self.conv_kernel_size,
            bias=False, learned_shifts=self.learned_shifts,
        )  # fmt: skip


class Block(nn.Module):
    """x + conv1×1(attention(x)), with batch norm and ReLU before both; the attention's output has
    channels / 4 channels."""

    def __init__(self, channels: int, attention: ImageAttention):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.attention = attention
        self.norm2 = nn.BatchNorm2d(channels // MIDDLE)
        # A bias would be useless: the batch norm that follows each stage would subtract it.
        self.conv = nn.Conv2d(channels // MIDDLE, channels, 1, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(self.relu(self.norm1(x)))
        return x + self.conv(self.relu(self.norm2(y)))


class Stage(nn.Module):
    """A pool that halves the size (rounded up), a 1×1 convolution, blocks, batch norm and ReLU."""

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
    """A self-attention network: stem, five stages at strides 2 to 32, mean, logits; or the feature
    maps of the last four stages.

    As in SAN's code, all convolutions are 1×1 and torch's own initialisation is used.

    Args:
        config: all options. `san` fills them in for a named size.
    """

    def __init__(self, config: SANConfig):
        super().__init__()
        self.config = c = config
        self.in_channels, self.features_only = c.in_channels, c.features_only
        self.stem = nn.Sequential(
            nn.Conv2d(c.in_channels, c.dim, 1, bias=False), nn.BatchNorm2d(c.dim), nn.ReLU()
        )
        before, stages = c.dim, []
        for times, depth, kernel in zip(MULTIPLES, c.depths, c.kernel_sizes, strict=True):
            after = c.dim * times
            blocks = [Block(after, c.attention(after, kernel)) for _ in range(depth)]
            stages.append(Stage(before, after, blocks))
            before = after
        self.stages = nn.ModuleList(stages)
        self.channels = tuple(c.dim * times for times in MULTIPLES[1:])
        if not c.features_only:
            self.head = nn.Linear(before, c.num_classes)

    def feature_maps(self, image: Tensor) -> list[Tensor]:
        x, maps = self.stem(image), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[1:]


def san(size: str = "19", mixer: str = "attention", **overrides: Any) -> SAN:
    """A SAN of a named size ("10", "15", "19").

    Args:
        size: the depths of the stages.
        mixer: "acmix" or "attention".
        overrides: any other option of `SANConfig`.

    Raises:
        ValueError: an unknown size, mixer or option, or values that do not fit.
    """
    depths = SANS[check_choice("size", size, list(SANS))]
    given = current_arguments(SANConfig, overrides)
    return SAN(configure(SANConfig, **({"mixer": mixer, "depths": depths} | given)))


register_family("san", san, SANConfig)
for _size in SANS:
    register_model(f"san{_size}", san, size=_size, mixer="attention")
    register_model(f"acmix_san{_size}", san, size=_size, mixer="acmix")
