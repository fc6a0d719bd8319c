"""Pyramid vision transformer (v1), and ACmix-PVT, whose attention gains the convolution path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._renamed import current_arguments, renamed_arguments
from ..layouts import Sizes
from ..modules.convolution_path import pad_to_multiple
from ..modules.reduced import ReducedACmix2d, ReducedAttention2d
from .backbone import (
    Backbone,
    DropPath,
    RecomputedBlock,
    drop_path_rates,
    init_truncated_normal,
)
from .configuration import check_choice, check_positive, configure, height_width, hidden_channels
from .registry import register_family, register_model

__all__ = ["PVT", "PVTS", "PVTConfig", "pvt"]

# The number of blocks per stage.
PVTS = {"tiny": (2, 2, 2, 2), "small": (3, 4, 6, 3)}


@renamed_arguments(
    layers="depths",
    widths="dims",
    patches="patch_sizes",
    conv_kernel="conv_kernel_size",
    drop_path="drop_path_rate",
    all_rows="full_last_block",
)
@dataclass
class PVTConfig:
    """All options of a `PVT`.

    Args:
        mixer: "attention" (over a spatially reduced grid) or "acmix".
        image_size: an int or (height, width) in pixels that the position embeddings are made for;
            for other sizes they are interpolated.
        depths: the number of blocks per stage (four stages).
        dims: channels per stage.
        heads: the number of heads per stage.
        mlp_ratios: hidden channels of a block's MLP as a multiple of its channels, per stage.
        reductions: the number of tokens per axis that become one key, per stage. It is 1 in the
            last stage, which has the class token.
        patch_sizes: per stage, the number of pixels (or of positions of the stage before) per axis
            that become one token.
        in_channels: channels of the image.
        num_classes: the number of logits.
        conv_kernel_size, learned_shifts: as in `ReducedACmix2d`.
        drop_path_rate: the rate of stochastic depth of the last block. It rises linearly from 0 in
            the first block.
        full_last_block: whether the last block computes all tokens although only the class token is
            read, as the authors count it. By default it computes the class token only, and has no
            convolution path.
        features_only: whether the model returns feature maps instead of logits.

    Raises:
        ValueError: naming the option, what came and what is wanted.
    """

    mixer: str = "attention"
    image_size: Sizes = 224
    depths: Sequence[int] = PVTS["tiny"]
    dims: Sequence[int] = (64, 128, 320, 512)
    heads: Sequence[int] = (1, 2, 5, 8)
    mlp_ratios: Sequence[float] = (8, 8, 4, 4)
    reductions: Sequence[int] = (8, 4, 2, 1)
    patch_sizes: Sequence[int] = (4, 2, 2, 2)
    in_channels: int = 3
    num_classes: int = 1000
    conv_kernel_size: int = 3
    learned_shifts: bool = True
    drop_path_rate: float = 0.1
    full_last_block: bool = False
    features_only: bool = False

    def __post_init__(self) -> None:
        check_choice("mixer", self.mixer, ["attention", "acmix"])
        size = self.image_size
        self.image_size = height_width(size)
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size: got {size}, want one or two numbers of at least 1")
        for name in ("depths", "dims", "heads", "mlp_ratios", "reductions", "patch_sizes"):
            value = getattr(self, name)
            if len(value) != 4 or min(value) <= 0:
                raise ValueError(f"{name}: got {value}, want four numbers above 0")
        check_positive(self, "in_channels", "num_classes")

    def attention(
        self, stage: int, grid: tuple[int, int], prefix: int, prefix_queries: bool
    ) -> ReducedAttention2d:
        """The attention of a block."""
        sizes = (self.dims[stage], grid, self.heads[stage], self.reductions[stage])
        if self.mixer == "attention":
            return ReducedAttention2d(*sizes, prefix=prefix, prefix_queries=prefix_queries)
        return ReducedACmix2d(
            *sizes, conv_kernel_size=self.conv_kernel_size, prefix=prefix,
            prefix_queries=prefix_queries, learned_shifts=self.learned_shifts,
        )  # fmt: skip


class Norm(nn.LayerNorm):
    """A layer norm with PVT's own epsilon."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)


class Block(RecomputedBlock):
    """A transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    After an attention with `prefix_queries` only the prefix tokens remain.
    """

    def __init__(self, dim: int, hidden: int, attention: ReducedAttention2d, drop_path_rate: float):
        super().__init__()
        self.norm1 = Norm(dim)
        self.attention = attention
        self.norm2 = Norm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.drop_path = DropPath(drop_path_rate)
        a = attention
        init_truncated_normal(a.q_proj, a.k_proj, a.v_proj, a.o_proj, self.mlp[0], self.mlp[2])

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        y = self.attention(self.norm1(x), grid=grid)
        x = x[:, : y.shape[1]] + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """One stage: a convolution that makes patches to tokens, position embeddings, and blocks.

    Args:
        in_channels, dim: channels of the map, and of the tokens.
        patch: positions along a side of a patch.
        grid: the grid of tokens that the position embeddings are made for.
        blocks: the blocks.
    """

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
        """The tokens after the last block, and the grid of those that have a position.

        Args:
            x: a map [batch, in_channels, height, width].
            prefix: tokens [1, prefix, dim] that come before those of the map.
        """
        x = self.embed(pad_to_multiple(x, self.patch, self.patch))
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
    """A pyramid vision transformer: four stages, norm, logits; or feature maps.

    The last stage has a class token. With `features_only` there is none, and the feature maps are
    the tokens of each stage without a norm, as in the authors' detectors. Images may have any size.
    ACmix-PVT is a reconstruction, since its authors released no code for it: see `ReducedACmix2d`.
    The last block computes the class token only. This saves 0.13 G of the multiply-adds that the
    authors count (at 224×224, tiny and small) and changes no logit; `full_last_block` computes all.

    Args:
        config: all options. `pvt` fills them in for a named size.
    """

    def __init__(self, config: PVTConfig):
        super().__init__()
        self.config = c = config
        self.in_channels, self.features_only = c.in_channels, c.features_only
        self.channels = tuple(c.dims)
        self.strides = tuple(math.prod(c.patch_sizes[: i + 1]) for i in range(4))
        rates = iter(drop_path_rates(c.drop_path_rate, sum(c.depths)))
        before, grid, stages = c.in_channels, height_width(c.image_size), []
        for i, (dim, depth) in enumerate(zip(c.dims, c.depths, strict=True)):
            grid = (-(-grid[0] // c.patch_sizes[i]), -(-grid[1] // c.patch_sizes[i]))
            prefix = 1 if i == 3 and not c.features_only else 0
            blocks = []
            for j in range(depth):
                last = bool(prefix) and j == depth - 1 and not c.full_last_block
                attention = c.attention(i, grid, prefix, last)
                blocks.append(
                    Block(
                        dim,
                        hidden_channels(dim, c.mlp_ratios[i], "mlp_ratios"),
                        attention,
                        next(rates),
                    )
                )
            stages.append(Stage(before, dim, c.patch_sizes[i], grid, blocks))
            before = dim
        self.stages = nn.ModuleList(stages)
        if not c.features_only:
            self.cls_token = nn.Parameter(torch.empty(1, 1, before))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
            self.norm = Norm(before)
            self.head = nn.Linear(before, c.num_classes)
            init_truncated_normal(self.head)

    def feature_maps(self, image: Tensor) -> list[Tensor]:
        if not self.features_only:
            raise ValueError("features_only: got False, feature_maps wants a PVT made with True")
        return self._maps(image, len(self.stages))

    def _maps(self, image: Tensor, stages: int) -> list[Tensor]:
        """The feature maps of the first `stages` stages, which have no class token."""
        x, maps = image, []
        for stage in self.stages[:stages]:
            tokens, grid = stage(x)
            x = tokens.transpose(1, 2).unflatten(2, grid)
            maps.append(x)
        return maps

    def logits(self, image: Tensor) -> Tensor:
        tokens, _ = self.stages[-1](self._maps(image, len(self.stages) - 1)[-1], self.cls_token)
        return self.head(self.norm(tokens[:, 0]))


def pvt(size: str = "tiny", mixer: str = "attention", **overrides: Any) -> PVT:
    """A pyramid vision transformer of a named size ("tiny", "small").

    Args:
        size: the depths of the stages.
        mixer: "acmix" or "attention".
        overrides: any other option of `PVTConfig`.

    Raises:
        ValueError: an unknown size, mixer or option, or values that do not fit.
    """
    depths = PVTS[check_choice("size", size, list(PVTS))]
    given = current_arguments(PVTConfig, overrides)
    return PVT(configure(PVTConfig, **({"mixer": mixer, "depths": depths} | given)))


register_family("pvt", pvt, PVTConfig)
for _size in PVTS:
    register_model(f"pvt_{_size}", pvt, size=_size, mixer="attention")
    register_model(f"acmix_pvt_{_size}", pvt, size=_size, mixer="acmix")
