"""Swin transformer, and ACmix-Swin, whose window attention gains the convolution path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._renamed import current_arguments, renamed_arguments
from ..layouts import Sizes
from ..modules.convolution_path import pad_to_multiple
from ..modules.window import WindowACmix2d, WindowAttention2d
from .backbone import (
    Backbone,
    ChannelNorm,
    DropPath,
    RecomputedBlock,
    drop_path_rates,
    init_truncated_normal,
)
from .configuration import (
    check_choice,
    check_positive,
    configure,
    height_width,
    hidden_channels,
)
from .registry import register_family, register_model

__all__ = ["SWINS", "Swin", "SwinConfig", "swin"]

# The number of blocks per stage, and the drop path rate that the authors of ACmix train with.
SWINS: dict[str, dict[str, Any]] = {
    "tiny": {"depths": (2, 2, 6, 2), "drop_path_rate": 0.2},
    "small": {"depths": (2, 2, 18, 2), "drop_path_rate": 0.3},
}


@renamed_arguments(
    layers="depths",
    width="dim",
    window="window_size",
    conv_kernel="conv_kernel_size",
    drop_path="drop_path_rate",
)
@dataclass
class SwinConfig:
    """All options of a `Swin`.

    Args:
        mixer: "attention" (within windows, which are shifted by half a window in every second
            block) or "acmix".
        depths: the number of blocks per stage (four stages).
        in_channels: channels of the image.
        num_classes: the number of logits.
        patch_size: pixels along a side of a patch.
        dim: channels of the first stage. They double from stage to stage.
        heads: the number of heads per stage.
        mlp_ratio: hidden channels of a block's MLP, as a multiple of the block's.
        window_size, conv_kernel_size, learned_shifts, published, qk_scale: as in `WindowACmix2d`.
        qkv_bias: whether the query, key and value projections, and ACmix's convolution, have a
            bias.
        patch_norm: whether a layer norm follows the embedding of patches.
        absolute_positions: the size of images in pixels, an int or (height, width), for which
            learned absolute positions are added to the patches; those of other images are
            interpolated. None adds none.
        drop_path_rate: the rate of stochastic depth of the last block. It rises linearly from 0 in
            the first block.
        features_only: whether the model returns feature maps instead of logits.

    Raises:
        ValueError: naming the option, what came and what is wanted.
    """

    mixer: str = "attention"
    depths: Sequence[int] = (2, 2, 6, 2)
    in_channels: int = 3
    num_classes: int = 1000
    patch_size: int = 4
    dim: int = 96
    heads: Sequence[int] = (3, 6, 12, 24)
    mlp_ratio: float = 4.0
    window_size: int = 7
    conv_kernel_size: int = 3
    learned_shifts: bool = True
    published: bool = False
    qk_scale: float | None = None
    qkv_bias: bool = True
    patch_norm: bool = True
    absolute_positions: Sizes | None = None
    drop_path_rate: float = 0.2
    features_only: bool = False

    def __post_init__(self) -> None:
        check_choice("mixer", self.mixer, ["attention", "acmix"])
        for name in ("depths", "heads"):
            value = getattr(self, name)
            if len(value) != 4 or min(value) < 1:
                raise ValueError(f"{name}: got {value}, want four numbers of at least 1")
        check_positive(self, "in_channels", "num_classes", "patch_size", "dim")
        if self.absolute_positions is not None:
            self.absolute_positions = size = height_width(self.absolute_positions)
            if len(size) != 2 or min(size) < 1:
                raise ValueError(f"absolute_positions: got {size}, want a height and a width")

    def attention(self, channels: int, heads: int, shifted: bool) -> WindowAttention2d:
        """The attention of a block."""
        shift = self.window_size // 2 if shifted else 0
        if self.mixer == "attention":
            return WindowAttention2d(
                channels, heads, self.window_size, shift, self.qkv_bias, self.qk_scale
            )
        return WindowACmix2d(
            channels, heads, self.window_size, shift, self.conv_kernel_size, self.qkv_bias,
            learned_shifts=self.learned_shifts, published=self.published, qk_scale=self.qk_scale,
        )  # fmt: skip


class Block(RecomputedBlock):
    """A transformer block on a map: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, channels: int, hidden: int, attention: WindowAttention2d, drop_path_rate: float
    ):
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.attention = attention
        self.norm2 = ChannelNorm(channels)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, channels, 1)
        )
        self.drop_path = DropPath(drop_path_rate)
        a = attention
        init_truncated_normal(a.q_proj, a.k_proj, a.v_proj, a.o_proj, self.mlp[0], self.mlp[2])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbedding(nn.Module):
    """An image -> a map with one position per patch; the image is padded to whole patches."""

    def __init__(self, in_channels: int, channels: int, patch: int, norm: bool = True):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(in_channels, channels, patch, patch)
        self.norm = ChannelNorm(channels) if norm else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(pad_to_multiple(image, self.patch, self.patch)))


class PatchMerging(nn.Module):
    """A map -> one of half the size and twice the channels; an odd size is padded with zeros."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(4 * channels)
        self.proj = nn.Conv2d(4 * channels, 2 * channels, 1, bias=False)
        init_truncated_normal(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x, 2, 2)
        # The four neighbours are ordered column by column, as published weights expect.
        x = torch.cat([x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)], 1)
        return self.proj(self.norm(x))


class Swin(Backbone):
    """A Swin transformer: patches, four stages of blocks, norm, mean, logits; or feature maps.

    Patch merging halves the map between stages. With `features_only` each feature map has a layer
    norm of its own, as in the authors' detectors. Images may have any size.

    Args:
        config: all options. `swin` fills them in for a named size.
    """

    def __init__(self, config: SwinConfig):
        super().__init__()
        self.config = c = config
        self.in_channels, self.features_only = c.in_channels, c.features_only
        self.channels = tuple(c.dim * 2**i for i in range(4))
        self.strides = tuple(c.patch_size * 2**i for i in range(4))
        self.embed = PatchEmbedding(c.in_channels, c.dim, c.patch_size, c.patch_norm)
        self.positions: nn.Parameter | None = None
        if c.absolute_positions is not None:
            patches = [-(-n // c.patch_size) for n in height_width(c.absolute_positions)]
            self.positions = nn.Parameter(torch.empty(1, c.dim, *patches))
            nn.init.trunc_normal_(self.positions, std=0.02)
        rates = iter(drop_path_rates(c.drop_path_rate, sum(c.depths)))
        stages = []
        for i, (depth, heads) in enumerate(zip(c.depths, c.heads, strict=True)):
            channels = self.channels[i]
            parts: list[nn.Module] = [PatchMerging(self.channels[i - 1])] if i else []
            for j in range(depth):
                attention = c.attention(channels, heads, shifted=j % 2 == 1)
                hidden = hidden_channels(channels, c.mlp_ratio)
                parts.append(Block(channels, hidden, attention, next(rates)))
            stages.append(nn.Sequential(*parts))
        self.stages = nn.ModuleList(stages)
        # For logits only the last map is normed. Its norm has the same name in both cases.
        normed: list[Callable[[int], nn.Module]] = [nn.Identity] * 3 + [ChannelNorm]
        if c.features_only:
            normed = [ChannelNorm] * 4
        self.norms = nn.ModuleList([make(n) for make, n in zip(normed, self.channels, strict=True)])
        if not c.features_only:
            self.head = nn.Linear(self.channels[-1], c.num_classes)
            init_truncated_normal(self.head)

    def feature_maps(self, image: Tensor) -> list[Tensor]:
        x, maps = self._placed(self.embed(image)), []
        for stage, norm in zip(self.stages, self.norms, strict=True):
            x = stage(x)
            maps.append(norm(x))
        return maps

    def _placed(self, x: Tensor) -> Tensor:
        """A map with learned absolute positions, if the model has them."""
        if self.positions is None:
            return x
        positions: Tensor = self.positions
        if positions.shape[2:] != x.shape[2:]:
            positions = F.interpolate(positions, x.shape[2:], mode="bicubic", align_corners=False)
        return x + positions


def swin(size: str = "tiny", mixer: str = "attention", **overrides: Any) -> Swin:
    """A Swin transformer of a named size ("tiny", "small").

    Args:
        size: the depths of the stages, and the drop path rate.
        mixer: "acmix" or "attention".
        overrides: any other option of `SwinConfig`.

    Raises:
        ValueError: an unknown size, mixer or option, or values that do not fit.
    """
    given = SWINS[check_choice("size", size, list(SWINS))] | {"mixer": mixer}
    given |= current_arguments(SwinConfig, overrides)
    return Swin(configure(SwinConfig, **given))


register_family("swin", swin, SwinConfig)
for _size in SWINS:
    register_model(f"swin_{_size}", swin, size=_size, mixer="attention")
    register_model(f"acmix_swin_{_size}", swin, size=_size, mixer="acmix")
