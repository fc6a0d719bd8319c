"""Swin transformer, and ACmix-Swin: every window attention gains the convolution path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.acmix import filled
from ..modules.window import WindowACmix2d, WindowAttention2d
from .backbone import Backbone, ChannelNorm, DropPath, drop_rates, truncated
from .blocks import choose
from .vit import configure

__all__ = ["SWINS", "Swin", "SwinConfig", "swin"]

# Blocks per stage, and the drop path that the authors of ACmix train them with.
SWINS = {
    "tiny": {"layers": (2, 2, 6, 2), "drop_path": 0.2},
    "small": {"layers": (2, 2, 18, 2), "drop_path": 0.3},
}


@dataclass
class SwinConfig:
    """Everything that a `Swin` is made from.

    mixer: "attention" (within windows, shifted by half of one in every second block) or "acmix".
    layers: blocks per stage. width: channels of the first stage; they double from stage to stage.
    heads: per stage. mlp_ratio: hidden channels of a block's MLP over its own. drop_path: of the
    last block, rising linearly from 0 at the first. window, conv_kernel, learned_shifts, published:
    as in WindowACmix2d.
    """

    mixer: str = "acmix"
    layers: Sequence[int] = (2, 2, 6, 2)
    in_channels: int = 3
    num_classes: int = 1000
    patch_size: int = 4
    width: int = 96
    heads: Sequence[int] = (3, 6, 12, 24)
    mlp_ratio: float = 4.0
    window: int = 7
    conv_kernel: int = 3
    learned_shifts: bool = True
    published: bool = False
    drop_path: float = 0.2
    features_only: bool = False

    def __post_init__(self) -> None:
        choose("mixer", self.mixer, ["attention", "acmix"])
        for name in ("layers", "heads"):
            value = getattr(self, name)
            if len(value) != 4 or min(value) < 1:
                raise ValueError(f"{name}: got {value}, want four numbers of at least 1")
        for name in ("in_channels", "num_classes", "patch_size", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, want at least 1")

    def attention(self, channels: int, heads: int, shifted: bool) -> WindowAttention2d:
        """What mixes the places in a block."""
        shift = self.window // 2 if shifted else 0
        if self.mixer == "attention":
            return WindowAttention2d(channels, heads, self.window, shift)
        return WindowACmix2d(
            channels, heads, self.window, shift, self.conv_kernel,
            learned_shifts=self.learned_shifts, published=self.published,
        )  # fmt: skip


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); each norm before its branch."""

    def __init__(self, channels: int, hidden: int, attention: WindowAttention2d, drop_path: float):
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.attention = attention
        self.norm2 = ChannelNorm(channels)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, channels, 1)
        )
        self.drop_path = DropPath(drop_path)
        a = attention
        truncated(a.q_proj, a.k_proj, a.v_proj, a.o_proj, self.mlp[0], self.mlp[2])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbedding(nn.Module):
    """Image -> a map of its patches; the last ones are filled up with zeros."""

    def __init__(self, in_channels: int, channels: int, patch: int):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(in_channels, channels, patch, patch)
        self.norm = ChannelNorm(channels)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(filled(image, self.patch, self.patch)))


class PatchMerging(nn.Module):
    """A map of half the size and twice the channels; an odd size is filled up with zeros."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(4 * channels)
        self.proj = nn.Conv2d(4 * channels, 2 * channels, 1, bias=False)
        truncated(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        x = filled(x, 2, 2)
        # the four neighbours column by column, as in the published weights
        x = torch.cat([x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)], 1)
        return self.proj(self.norm(x))


class Swin(Backbone):
    """Patches, four stages of blocks with a merging between, norm, mean -> logits; or the maps.

    Each of the maps of `features_only` has a layer norm of its own, as in the authors' detectors.
    Images may have any size.
    """

    def __init__(self, config: SwinConfig):
        super().__init__()
        self.config = c = config
        self.in_channels, self.features_only = c.in_channels, c.features_only
        self.channels = tuple(c.width * 2**i for i in range(4))
        self.strides = tuple(c.patch_size * 2**i for i in range(4))
        self.embed = PatchEmbedding(c.in_channels, c.width, c.patch_size)
        rates = iter(drop_rates(c.drop_path, sum(c.layers)))
        stages = []
        for i, (depth, heads) in enumerate(zip(c.layers, c.heads, strict=True)):
            channels = self.channels[i]
            parts: list[nn.Module] = [PatchMerging(self.channels[i - 1])] if i else []
            for j in range(depth):
                attention = c.attention(channels, heads, shifted=j % 2 == 1)
                parts.append(Block(channels, int(channels * c.mlp_ratio), attention, next(rates)))
            stages.append(nn.Sequential(*parts))
        self.stages = nn.ModuleList(stages)
        # for logits only the last map is normed; its norm has the same name in both
        normed: list[Callable[[int], nn.Module]] = [nn.Identity] * 3 + [ChannelNorm]
        if c.features_only:
            normed = [ChannelNorm] * 4
        self.norms = nn.ModuleList([make(n) for make, n in zip(normed, self.channels, strict=True)])
        if not c.features_only:
            self.head = nn.Linear(self.channels[-1], c.num_classes)
            truncated(self.head)

    def feature_maps(self, image: Tensor) -> list[Tensor]:
        x, maps = self.embed(image), []
        for stage, norm in zip(self.stages, self.norms, strict=True):
            x = stage(x)
            maps.append(norm(x))
        return maps

    def classify(self, last: Tensor) -> Tensor:
        return self.head(last.mean((2, 3)))


def swin(size: str = "tiny", mixer: str = "acmix", **overrides: Any) -> Swin:
    """A Swin transformer of a named size ("tiny", "small"); any field of `SwinConfig` can be given.

    Raises:
        ValueError: an unknown size, mixer or field, or values that don't fit.
    """
    given = SWINS[choose("size", size, list(SWINS))] | {"mixer": mixer}
    return Swin(configure(SwinConfig, **(given | overrides)))
