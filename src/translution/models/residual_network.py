"""ResNet, and ACmix-ResNet: every middle 3×3 convolution becomes attention and convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .._renamed import current_arguments, renamed_arguments
from ..modules.acmix import ACmix2d
from .backbone import Backbone
from .configuration import check_choice, check_positive, configure
from .registry import register_family, register_model

__all__ = ["RESNETS", "ResNet", "ResNetConfig", "resnet"]

# Blocks per stage (ACmix, section 5.1; 26 and 38 as in stand-alone self-attention).
INITS = ("kaiming", "xavier", "torch", "published")
RESNETS = {"26": (1, 2, 4, 1), "38": (2, 3, 5, 2), "50": (3, 4, 6, 3)}


@renamed_arguments(
    layers="depths",
    width="dim",
    attention_kernel="kernel_size",
    conv_kernel="conv_kernel_size",
)
@dataclass
class ResNetConfig:
    """All options of a `ResNet`.

    Args:
        mixer: the middle layer of a bottleneck: "convolution" (3×3) or "acmix".
        depths: the number of blocks per stage (four stages).
        in_channels: channels of the image.
        num_classes: the number of logits.
        dim: channels of the stem and of the bottlenecks of the first stage. They double from stage
            to stage.
        groups: groups of the 3×3 convolutions, for the mixer "convolution".
        width_per_group: channels of a group in a bottleneck of the first stage, as in ResNeXt and
            wide ResNets. None is dim / groups.
        expansion: channels of a block's output, as a multiple of those of its bottleneck.
        heads, kernel_size, conv_kernel_size, learned_shifts, published: as in `ACmix2d`.
        zero_init_residual: whether the last norm of each block starts at zero, so that a new block
            passes its input on.
        init: how convolutions start. "kaiming", those of the bottlenecks, by the number of their
            outputs; "xavier", these by the numbers of inputs and outputs; "torch", as torch's own;
            "published", as in the published code, where "kaiming" also replaces the shift kernels
            and all other weights of ACmix, the stem and the shortcuts.
        features_only: whether the model returns feature maps instead of logits.

    Raises:
        ValueError: naming the option, what came and what is wanted.
    """

    mixer: str = "convolution"
    depths: Sequence[int] = RESNETS["50"]
    in_channels: int = 3
    num_classes: int = 1000
    dim: int = 64
    groups: int = 1
    width_per_group: int | None = None
    expansion: int = 4
    heads: int = 4
    kernel_size: int = 7
    conv_kernel_size: int = 3
    learned_shifts: bool = True
    published: bool = False
    zero_init_residual: bool = False
    init: str = "kaiming"
    features_only: bool = False

    def __post_init__(self) -> None:
        check_choice("mixer", self.mixer, ["convolution", "acmix"])
        if len(self.depths) != 4 or min(self.depths) < 1:
            raise ValueError(f"depths: got {self.depths}, want four numbers of at least 1")
        check_choice("init", self.init, INITS)
        check_positive(self, "in_channels", "num_classes", "dim", "expansion", "groups")
        if self.mixer == "acmix" and self.groups > 1:
            raise ValueError(f"groups: got {self.groups}, but the mixer 'acmix' has none; want 1")
        if self.width_per_group is not None:
            check_positive(self, "width_per_group")
        elif self.dim % self.groups:
            raise ValueError(
                f"groups: got {self.groups}, want a divisor of dim {self.dim} (or give "
                "width_per_group)"
            )

    def width(self, stage: int) -> int:
        """The channels of the bottlenecks of a stage."""
        first = self.dim if self.width_per_group is None else self.width_per_group * self.groups
        return first * 2**stage

    def middle(self, channels: int, stride: int) -> nn.Module:
        """The layer between the two 1×1 convolutions of a bottleneck."""
        if self.mixer == "convolution":
            size = self.conv_kernel_size
            return nn.Conv2d(
                channels, channels, size, stride, size // 2, groups=self.groups, bias=False
            )
        return ACmix2d(
            channels, channels, self.heads, self.kernel_size, self.conv_kernel_size, stride,
            learned_shifts=self.learned_shifts, published=self.published,
        )  # fmt: skip


class Bottleneck(nn.Module):
    """x + conv1×1(middle(conv1×1(x))), with batch norm after each layer. The middle layer has the
    stride. `init` and `zero_init_residual` are those of `ResNetConfig`."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        out_channels: int,
        stride: int,
        middle: Callable[[int, int], nn.Module],
        init: str = "kaiming",
        zero_init_residual: bool = False,
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
            _initialise(conv, init)
        if init == "published" and isinstance(self.shortcut, nn.Sequential):
            _initialise(self.shortcut[0], init)
        if zero_init_residual:
            nn.init.zeros_(self.norm3.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.relu(self.norm2(self.conv2(y)))
        return self.relu(self.shortcut(x) + self.norm3(self.conv3(y)))


def _initialise(conv: nn.Module, init: str) -> None:
    """Initialise the weights of a convolution by name. ACmix initialises its own parts, except in
    the published code."""
    weights = [conv.weight] if isinstance(conv, nn.Conv2d) else []
    if init == "published" and isinstance(conv, ACmix2d):
        parts = conv.q_proj, conv.k_proj, conv.v_proj, conv.position_proj, conv.convolution.fc
        weights = [part.weight for part in parts]
        if conv.convolution.shifts is not None:
            weights.append(conv.convolution.shifts)
    for weight in weights:
        if init in ("kaiming", "published"):
            nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
        elif init == "xavier":
            nn.init.xavier_uniform_(weight)


class ResNet(Backbone):
    """A ResNet: stem, four stages of bottlenecks, mean, logits; or the feature maps of the stages.

    Args:
        config: all options. `resnet` fills them in for a named size.
    """

    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.config = c = config
        self.in_channels, self.features_only = c.in_channels, c.features_only
        self.stem = nn.Sequential(
            nn.Conv2d(c.in_channels, c.dim, 7, 2, 3, bias=False),
            nn.BatchNorm2d(c.dim),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )
        if c.init == "published":
            _initialise(self.stem[0], c.init)
        before, stages = c.dim, []
        for i, depth in enumerate(c.depths):
            after = c.dim * 2**i * c.expansion
            blocks = []
            for j in range(depth):
                stride = 2 if i and not j else 1
                blocks.append(
                    Bottleneck(
                        before, c.width(i), after, stride, c.middle, c.init, c.zero_init_residual
                    )
                )
                before = after
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.channels = tuple(c.dim * 2**i * c.expansion for i in range(4))
        if not c.features_only:
            self.head = nn.Linear(before, c.num_classes)

    def feature_maps(self, image: Tensor) -> list[Tensor]:
        x, maps = self.stem(image), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def resnet(size: str = "50", mixer: str = "convolution", **overrides: Any) -> ResNet:
    """A ResNet of a named size ("26", "38", "50").

    Args:
        size: the depths of the stages.
        mixer: "acmix" or "convolution".
        overrides: any other option of `ResNetConfig`.

    Raises:
        ValueError: an unknown size, mixer or option, or values that do not fit.
    """
    depths = RESNETS[check_choice("size", size, list(RESNETS))]
    given = current_arguments(ResNetConfig, overrides)
    return ResNet(configure(ResNetConfig, **({"mixer": mixer, "depths": depths} | given)))


register_family("resnet", resnet, ResNetConfig)
for _size in RESNETS:
    register_model(f"resnet{_size}", resnet, size=_size, mixer="convolution")
    register_model(f"acmix_resnet{_size}", resnet, size=_size, mixer="acmix")
