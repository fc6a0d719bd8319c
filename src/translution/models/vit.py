"""The vision transformer, with any mixer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import CHECKPOINTS, MIXERS, SIZES, Block, Mixing, choose, head_dim_of, mixers_of_layers
from .pretrained import Pretrained

__all__ = ["ViT", "ViTConfig", "vit"]


@dataclass
class ViTConfig(Mixing):
    """Everything that a `ViT` is made from.

    image_size, patch_size: pixels, an int or (height, width). pool: "cls" (a class token, read at
    the end) or "mean"; None is "cls", or "mean" for the mixer "convolution". all_rows: with a class
    token the last block answers for it alone and its tables hold the token's own rows; True keeps
    every row, as the published code does, where they get no gradient. published: with rotary
    attention also learned positions, as the published code has, to use its weights.
    """

    image_size: Any = 224
    patch_size: Any = 16
    in_channels: int = 3
    num_classes: int = 1000
    dim: int = 192
    depth: int = 6
    heads: int = 3
    head_dim: int | None = None
    mlp_ratio: float = 4.0
    pool: str | None = None
    all_rows: bool = False
    published: bool = False

    def __post_init__(self) -> None:
        choose("checkpoint", self.checkpoint, CHECKPOINTS)
        choose("mixer", self.mixer, list(MIXERS))
        if self.pool is None:
            self.pool = "mean" if self.mixer == "convolution" else "cls"
        choose("pool", self.pool, ["cls", "mean"])
        self.image_size, self.patch_size = _pair(self.image_size), _pair(self.patch_size)
        for pixels, patch in zip(self.image_size, self.patch_size, strict=True):
            if patch < 1 or pixels < 1 or pixels % patch:
                raise ValueError(
                    f"image_size: got {self.image_size}, want a multiple of patch_size "
                    f"{self.patch_size}"
                )
        for name in ("in_channels", "num_classes", "dim", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, want at least 1")
        self.head_dim = head_dim_of(self.dim, self.heads, self.head_dim)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per axis."""
        (height, width), (ph, pw) = self.image_size, self.patch_size
        return height // ph, width // pw


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


class PatchEmbedding(nn.Module):
    """Image [batch, in_channels, height, width] -> tokens [batch, patches, dim].

    The pixels of a patch in the order (row, column, channel), LayerNorm, Linear, LayerNorm.
    """

    def __init__(self, in_channels: int, patch: tuple[int, int], dim: int):
        super().__init__()
        self.patch = patch
        pixels = in_channels * patch[0] * patch[1]
        self.norm1 = nn.LayerNorm(pixels)
        self.proj = nn.Linear(pixels, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        ph, pw = self.patch
        x = image.unflatten(3, (-1, pw)).unflatten(2, (-1, ph))
        x = x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return self.norm2(self.proj(self.norm1(x)))


class ViT(Pretrained):
    """Patches -> blocks -> class token (or mean) -> logits [batch, num_classes].

    Args:
        config: all options; `vit` makes one from a size's name.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = c = config
        self.embed = PatchEmbedding(c.in_channels, c.patch_size, c.dim)
        self.prefix = 1 if c.pool == "cls" else 0
        self.cls_token: nn.Parameter | None = None
        if self.prefix:
            self.cls_token = nn.Parameter(torch.randn(1, 1, c.dim) * 0.02)
        self.positions: nn.Parameter | None = None
        if MIXERS[c.mixer] or (c.published and c.mixer == "rotary"):
            self.positions = nn.Parameter(torch.randn(1, *c.grid, c.dim) * 0.02)
        blocks = []
        for i, mixer in enumerate(mixers_of_layers(c, c.depth, after="rotary")):
            last = i == c.depth - 1 and bool(self.prefix) and not c.all_rows
            mixing = c.make(
                mixer, c.dim, c.grid, c.heads, c.head_dim,
                prefix=self.prefix, prefix_queries=last,
            )  # fmt: skip
            blocks.append(Block(c.dim, mixing, c.mlp_ratio, c.dropout, c.checkpoint))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(c.dim)
        self.head = nn.Linear(c.dim, c.num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [batch, num_classes].

        Args:
            image: [batch, in_channels, height, width]; smaller ones than made for are fine.

        Raises:
            ValueError: other channels, or a size that is not of whole patches, or too large.
        """
        return self.head(self.features(image))

    def features(self, image: Tensor) -> Tensor:
        """[batch, dim]: what the head sees."""
        return self.pool(self.tokens(image))

    def tokens(self, image: Tensor, each: list[Tensor] | None = None) -> Tensor:
        """[batch, tokens, dim]: what the last block answers, normed; with a class token this comes
        first, and alone unless `all_rows`. `each` gets what every block answers."""
        grid = self.grid_of(image)
        x = self.embed(image)
        if self.positions is not None:
            x = x + self.positions[:, : grid[0], : grid[1]].flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x, grid)
            if each is not None:
                each.append(x)
        return self.norm(x)

    def pool(self, tokens: Tensor) -> Tensor:
        """[batch, dim] from `tokens`."""
        return tokens[:, 0] if self.prefix else tokens.mean(1)

    def grid_of(self, image: Tensor) -> tuple[int, int]:
        """Patches per axis of an image, which is checked."""
        c = self.config
        (ph, pw), most = c.patch_size, c.image_size
        fits = image.ndim == 4 and image.shape[1] == c.in_channels
        if fits:
            height, width = int(image.shape[2]), int(image.shape[3])
            fits = height % ph == 0 and width % pw == 0 and height > 0 and width > 0
            if self.positions is not None:
                fits = fits and height <= most[0] and width <= most[1]
        if not fits:
            raise ValueError(
                f"image: got shape {tuple(image.shape)}, want (batch, {c.in_channels}, {most[0]}, "
                f"{most[1]}), or smaller by whole patches of {ph}×{pw}"
            )
        return height // ph, width // pw


def vit(
    size: str = "tiny",
    mixer: str = "translution",
    image_size: Any = 224,
    patch_size: Any = 16,
    num_classes: int = 1000,
    **overrides: Any,
) -> ViT:
    """A vision transformer of a named size ("tiny", "mini", "small", "base", "large").

    Any field of `ViTConfig` can be given, such as `dim`, `depth`, `heads`, `relative`,
    `relative_layers`, `pool`.

    Raises:
        ValueError: an unknown size, mixer or field, or values that don't fit.
    """
    given = vars(SIZES[choose("size", size, list(SIZES))]) | overrides
    given |= {"image_size": image_size, "patch_size": patch_size, "num_classes": num_classes}
    return ViT(configure(ViTConfig, mixer=mixer, **given))


def configure(kind: Any, **fields: Any) -> Any:
    """A configuration from its fields; an unknown one is named, with those that exist."""
    known = list(kind.__dataclass_fields__)
    for name in fields:
        choose(f"option of {kind.__name__}", name, known)
    return kind(**fields)
