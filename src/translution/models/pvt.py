"""Pyramid vision transformer (v1), and ACmix-PVT: its attention gains the convolution path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.acmix import filled
from ..modules.reduced import ReducedACmix2d, ReducedAttention2d
from .backbone import Backbone, DropPath, drop_rates, truncated
from .blocks import choose
from .vit import configure

__all__ = ["PVT", "PVTS", "PVTConfig", "pvt"]

# Blocks per stage.
PVTS = {"tiny": (2, 2, 2, 2), "small": (3, 4, 6, 3)}


@dataclass
class PVTConfig:
    """Everything that a `PVT` is made from.

    mixer: "attention" (over a spatially reduced grid) or "acmix". Per stage: layers (blocks),
    widths (channels), heads, mlp_ratios (hidden channels of a block's MLP over its own), reductions
    (places per axis that become one key; 1 in the last stage, which has the class token). patches:
    pixels, then places, per axis that become one place at the entrance of each stage. image_size:
    an int or (height, width) that the position embeddings are made for; for another they are
    interpolated. drop_path: of the last block, rising linearly from 0 at the first. all_rows: the
    last block answers for the class token alone, and has no convolution path; True keeps every
    row, as the authors count, where nothing reads them. conv_kernel, learned_shifts: as in
    ReducedACmix2d.
    """

    mixer: str = "acmix"
    image_size: Any = 224
    layers: Sequence[int] = PVTS["tiny"]
    widths: Sequence[int] = (64, 128, 320, 512)
    heads: Sequence[int] = (1, 2, 5, 8)
    mlp_ratios: Sequence[float] = (8, 8, 4, 4)
    reductions: Sequence[int] = (8, 4, 2, 1)
    patches: Sequence[int] = (4, 2, 2, 2)
    in_channels: int = 3
    num_classes: int = 1000
    conv_kernel: int = 3
    learned_shifts: bool = True
    drop_path: float = 0.1
    all_rows: bool = False
    features_only: bool = False

    def __post_init__(self) -> None:
        choose("mixer", self.mixer, ["attention", "acmix"])
        size = self.image_size
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size: got {size}, want one or two numbers of at least 1")
        for name in ("layers", "widths", "heads", "mlp_ratios", "reductions", "patches"):
            value = getattr(self, name)
            if len(value) != 4 or min(value) <= 0:
                raise ValueError(f"{name}: got {value}, want four numbers above 0")
        for name in ("in_channels", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, want at least 1")

    def attention(
        self, stage: int, grid: tuple[int, int], prefix: int, prefix_queries: bool
    ) -> ReducedAttention2d:
        """What mixes the tokens in a block."""
        sizes = (self.widths[stage], grid, self.heads[stage], self.reductions[stage])
        if self.mixer == "attention":
            return ReducedAttention2d(*sizes, prefix=prefix, prefix_queries=prefix_queries)
        return ReducedACmix2d(
            *sizes, conv_kernel=self.conv_kernel, prefix=prefix, prefix_queries=prefix_queries,
            learned_shifts=self.learned_shifts,
        )  # fmt: skip


class Norm(nn.LayerNorm):
    """With PVT's own small number."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); each norm before its branch.

    An attention that answers for the prefix alone cuts the tokens to the prefix.
    """

    def __init__(self, dim: int, hidden: int, attention: ReducedAttention2d, drop_path: float):
        super().__init__()
        self.norm1 = Norm(dim)
        self.attention = attention
        self.norm2 = Norm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.drop_path = DropPath(drop_path)
        a = attention
        truncated(a.q_proj, a.k_proj, a.v_proj, a.o_proj, self.mlp[0], self.mlp[2])

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        y = self.attention(self.norm1(x), grid=grid)
        x = x[:, : y.shape[1]] + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Patches of a map, their positions, blocks; `grid` is what the positions are made for."""

    def __init__(
        self, in_channels: int, dim: int, patch: int, grid: tuple[int, int], blocks: list[Block]
    ):
        super().__init__()
        self.patch = patch
        self.embed = nn.Conv2d(in_channels, dim, patch, patch)
        self.norm = Norm(dim)
        self.positions = nn.Parameter(torch.empty(1, dim, *grid))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
        """A map, and prefix tokens [1, prefix, dim] before it -> what the last block answers, as
        tokens, and the grid of those that have a place."""
        x = self.embed(filled(x, self.patch, self.patch))
        grid = (int(x.shape[2]), int(x.shape[3]))
        positions: Tensor = self.positions
        if positions.shape[2:] != grid:
            positions = F.interpolate(positions, grid, mode="bilinear")
        x = self.norm(x.flatten(2).transpose(1, 2)) + positions.flatten(2).transpose(1, 2)
        if prefix is not None:
            x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x, grid)
        return x, grid


class PVT(Backbone):
    """Four stages, the class token in the last, norm -> logits; or the maps.

    The maps of `features_only` are the stages' tokens as they are, without a norm or a class token,
    as in the authors' detectors. Images may have any size. How attention and convolution are mixed
    in a spatially reduced attention is inferred (see `ReducedACmix2d`): the authors of ACmix
    released no code for PVT. In the classifier the last block answers for the class token alone,
    which saves 0.13 G of the multiply-adds that the authors count (at 224×224, tiny and small) and
    changes no logit; `all_rows` keeps them.
    """

    def __init__(self, config: PVTConfig):
        super().__init__()
        self.config = c = config
        self.in_channels, self.features_only = c.in_channels, c.features_only
        self.channels = tuple(c.widths)
        self.strides = tuple(math.prod(c.patches[: i + 1]) for i in range(4))
        rates = iter(drop_rates(c.drop_path, sum(c.layers)))
        before, grid, stages = c.in_channels, c.image_size, []
        for i, (dim, depth) in enumerate(zip(c.widths, c.layers, strict=True)):
            grid = (-(-grid[0] // c.patches[i]), -(-grid[1] // c.patches[i]))
            prefix = 1 if i == 3 and not c.features_only else 0
            blocks = []
            for j in range(depth):
                last = bool(prefix) and j == depth - 1 and not c.all_rows
                attention = c.attention(i, grid, prefix, last)
                blocks.append(Block(dim, int(dim * c.mlp_ratios[i]), attention, next(rates)))
            stages.append(Stage(before, dim, c.patches[i], grid, blocks))
            before = dim
        self.stages = nn.ModuleList(stages)
        if not c.features_only:
            self.cls_token = nn.Parameter(torch.empty(1, 1, before))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
            self.norm = Norm(before)
            self.head = nn.Linear(before, c.num_classes)
            truncated(self.head)

    def feature_maps(self, image: Tensor) -> list[Tensor]:
        if not self.features_only:
            raise ValueError("features_only: got False, feature_maps wants a PVT made with True")
        return self._maps(image, len(self.stages))

    def _maps(self, image: Tensor, stages: int) -> list[Tensor]:
        """The maps of the first so many stages, none of which has the class token."""
        x, maps = image, []
        for stage in self.stages[:stages]:
            tokens, grid = stage(x)
            x = tokens.transpose(1, 2).unflatten(2, grid)
            maps.append(x)
        return maps

    def logits(self, image: Tensor) -> Tensor:
        tokens, _ = self.stages[-1](self._maps(image, len(self.stages) - 1)[-1], self.cls_token)
        return self.head(self.norm(tokens[:, 0]))


def pvt(size: str = "tiny", mixer: str = "acmix", **overrides: Any) -> PVT:
    """A pyramid vision transformer of a named size ("tiny", "small"); any field of `PVTConfig` can
    be given.

    Raises:
        ValueError: an unknown size, mixer or field, or values that don't fit.
    """
    layers = PVTS[choose("size", size, list(PVTS))]
    return PVT(configure(PVTConfig, **({"mixer": mixer, "layers": layers} | overrides)))
