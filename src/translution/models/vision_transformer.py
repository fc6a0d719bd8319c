"""The vision transformer, with any mixer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._renamed import renamed_arguments
from ..layouts import Sizes
from ..modules.checks import check_tensor
from .blocks import SIZES, Block, Mixing, mixers_of_blocks
from .configuration import check_choice, check_positive, configure, head_dim_of, height_width
from .mixers import for_each_mixer, takes_prefix
from .pretrained import Pretrained
from .registry import register_family, register_model

__all__ = ["ViT", "ViTConfig", "vit"]


def _learned_positions(published: bool, given: dict[str, Any]) -> dict[str, Any]:
    """The earlier option `published` had an effect with the mixer "rotary" only."""
    return {"learned_positions": True} if published and given.get("mixer") == "rotary" else {}


@renamed_arguments(all_rows="full_last_block", published=_learned_positions)
@dataclass
class ViTConfig(Mixing):
    """All options of a `ViT`.

    Args:
        image_size, patch_size: in pixels, an int or (height, width).
        in_channels: channels of the image.
        num_classes: the number of logits.
        dim, depth, heads: channels of a token, number of blocks, number of heads.
        head_dim: channels of a head; the default is dim / heads.
        mlp_ratio: hidden channels of a block's MLP, as a multiple of dim.
        pool: what the logits are computed from: "cls", a class token; "mean", the mean of all
            patches, without a class token; or "all", the mean of a class token and all patches, as
            the mean of the published code is. None is "cls", but "mean" for the mixer "convolution"
            and for mixers of your own that take no class token.
        stem: how patches become tokens. "patches" projects each by itself; "overlapping" projects
            the surrounding square of twice the side; "convolutional" applies 3×3 convolutions with
            strides whose product is patch_size (Xiao et al. 2021, "Early convolutions help
            transformers see better"), each with batch norm and GELU.
        full_last_block: whether the last block computes all tokens where only the class token is
            read, as the published code does. By default it computes the class token only, and its
            tables have no rows for other queries.
        mixer, mixer_options, relative, relative_depth, rank, position, learned_positions,
            kv_heads, window, dilation, buckets, init, conv_kernel_size, dropout,
            embedding_dropout, projection_dropout, activation_checkpointing: as in `Mixing`.

    Raises:
        ValueError: naming the option, what came and what is wanted.
    """

    image_size: Sizes = 224
    patch_size: Sizes = 16
    in_channels: int = 3
    num_classes: int = 1000
    dim: int = 192
    depth: int = 6
    heads: int = 3
    head_dim: int | None = None
    mlp_ratio: float = 4.0
    pool: str | None = None
    stem: str = "patches"
    full_last_block: bool = False

    def __post_init__(self) -> None:
        self.check_mixing()
        if self.pool is None:
            self.pool = "cls" if takes_prefix(self.mixer) else "mean"
        check_choice("pool", self.pool, ["cls", "mean", "all"])
        self.image_size, self.patch_size = (
            height_width(self.image_size),
            height_width(self.patch_size),
        )
        for pixels, patch in zip(self.image_size, self.patch_size, strict=True):
            if patch < 1 or pixels < 1 or pixels % patch:
                raise ValueError(
                    f"image_size: got {self.image_size}, want a multiple of patch_size "
                    f"{self.patch_size}"
                )
        check_choice("stem", self.stem, list(STEMS))
        check_positive(self, "in_channels", "num_classes", "dim", "depth", "heads")
        self.head_dim = head_dim_of(self.dim, self.heads, self.head_dim)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per axis."""
        (height, width), (ph, pw) = height_width(self.image_size), height_width(self.patch_size)
        return height // ph, width // pw


class PatchEmbedding(nn.Module):
    """Image [batch, in_channels, height, width] -> tokens [batch, patches, dim].

    The pixels of each patch, in the order (row, column, channel), go through a layer norm, a linear
    layer, and another layer norm.
    """

    def __init__(self, in_channels: int, patch: tuple[int, ...], dim: int):
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


class OverlappingPatches(nn.Module):
    """Image [batch, in_channels, height, width] -> tokens [batch, patches, dim].

    Each token is a projection of its patch and of half a patch on every side, with zeros outside of
    the image, followed by a layer norm.
    """

    def __init__(self, in_channels: int, patch: tuple[int, ...], dim: int):
        super().__init__()
        (ph, pw), before = patch, tuple(p // 2 for p in patch)
        self.pad = (before[1], pw - before[1], before[0], ph - before[0])
        self.proj = nn.Conv2d(in_channels, dim, (2 * ph, 2 * pw), (ph, pw))
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(F.pad(image, self.pad)).flatten(2).transpose(1, 2))


class ConvolutionalStem(nn.Module):
    """Image [batch, in_channels, height, width] -> tokens [batch, patches, dim].

    There is a convolution for each prime factor of the patch's sides, with this factor as its
    stride. The channels double from one to the next. A projection to dim and a layer norm follow.
    """

    def __init__(self, in_channels: int, patch: tuple[int, ...], dim: int):
        super().__init__()
        strides = list(zip_longest(*map(prime_factors, patch), fillvalue=1))
        layers: list[nn.Module] = []
        for i, stride in enumerate(strides):
            out = max(1, dim >> (len(strides) - 1 - i))
            # as wide as 3 and odd, so that a map of n · stride places becomes one of n
            kernel = tuple(max(3, s) for s in stride)
            half = tuple(k // 2 for k in kernel)
            layers += [
                nn.Conv2d(in_channels, out, kernel, stride, half, bias=False),  # type: ignore[arg-type]
                nn.BatchNorm2d(out),
                nn.GELU(),
            ]
            in_channels = out
        self.convolutions = nn.Sequential(*layers)
        self.proj = nn.Conv2d(in_channels, dim, 1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        x = self.proj(self.convolutions(image))
        return self.norm(x.flatten(2).transpose(1, 2))


def prime_factors(n: int) -> list[int]:
    """The prime factors of n in rising order; those of 12 are 2, 2 and 3."""
    found, factor = [], 2
    while n > 1:
        while n % factor == 0:
            found.append(factor)
            n //= factor
        factor += 1
    return found


STEMS: dict[str, Callable[[int, tuple[int, ...], int], nn.Module]] = {
    "patches": PatchEmbedding,
    "overlapping": OverlappingPatches,
    "convolutional": ConvolutionalStem,
}


class ViT(Pretrained):
    """A vision transformer: patches, blocks with any mixer, class token (or mean), logits.

    Args:
        config: all options. `vit` fills them in for a named size.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = c = config
        self.embed = STEMS[c.stem](c.in_channels, height_width(c.patch_size), c.dim)
        self.prefix = 0 if c.pool == "mean" else 1
        self.cls_token: nn.Parameter | None = None
        if self.prefix:
            self.cls_token = nn.Parameter(torch.randn(1, 1, c.dim) * 0.02)
        self.positions: nn.Parameter | None = None
        if c.adds_learned_positions:
            self.positions = nn.Parameter(torch.randn(1, *c.grid, c.dim) * 0.02)
        self.embedding_dropout = nn.Dropout(c.embedding_dropout)
        blocks = []
        for i, mixer in enumerate(mixers_of_blocks(c, c.depth, after="rotary")):
            last = i == c.depth - 1 and c.pool == "cls" and not c.full_last_block
            mixer_module = c.make(
                mixer, c.dim, c.grid, c.heads, c.head_dim,
                prefix=self.prefix, prefix_queries=last,
            )  # fmt: skip
            blocks.append(
                Block(
                    c.dim,
                    mixer_module,
                    c.mlp_ratio,
                    c.dropout,
                    c.activation_checkpointing,
                    c.projection_dropout,
                )
            )
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(c.dim)
        self.head = nn.Linear(c.dim, c.num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [batch, num_classes].

        Args:
            image: [batch, in_channels, height, width], made of whole patches, of the configured
                size or smaller. With a window or buckets, and without learned positions, it may
                also be larger.

        Raises:
            ValueError: the image has other channels, is too large, or is not made of whole patches.
        """
        return self.head(self.features(image))

    def features(self, image: Tensor) -> Tensor:
        """The features that the logits are computed from, [batch, dim]."""
        return self.pool(self.tokens(image))

    def tokens(self, image: Tensor, outputs: list[Tensor] | None = None) -> Tensor:
        """The tokens after the last block and its norm, [batch, tokens, dim].

        A class token comes first. With pool "cls" and without `full_last_block` it is the only one.

        Args:
            image: as in `forward`.
            outputs: a list to which the output of every block is appended.
        """
        grid = self.grid_of(image)
        x = self.embed(image)
        if self.positions is not None:
            x = x + self.positions[:, : grid[0], : grid[1]].flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        x = self.embedding_dropout(x)
        for block in self.blocks:
            x = block(x, grid)
            if outputs is not None:
                outputs.append(x)
        return self.norm(x)

    def pool(self, tokens: Tensor) -> Tensor:
        """The features [batch, dim] from the result of `tokens`."""
        return tokens[:, 0] if self.config.pool == "cls" else tokens.mean(1)

    def grid_of(self, image: Tensor) -> tuple[int, int]:
        """Patches per axis of an image.

        Raises:
            ValueError: as in `forward`.
        """
        c = self.config
        (ph, pw), most = height_width(c.patch_size), height_width(c.image_size)
        check_tensor("image", image, f"(batch, {c.in_channels}, height, width)")
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
    image_size: Sizes = 224,
    patch_size: Sizes = 16,
    num_classes: int = 1000,
    **overrides: Any,
) -> ViT:
    """A vision transformer of a named size ("tiny", "mini", "small", "base", "large").

    Args:
        size: dim, depth and heads, from `translution.models.blocks.SIZES`.
        mixer, image_size, patch_size, num_classes: as in `ViTConfig`.
        overrides: any other option of `ViTConfig`, such as dim, depth, relative or pool.

    Raises:
        ValueError: an unknown size, mixer or option, or values that do not fit.
    """
    given = vars(SIZES[check_choice("size", size, list(SIZES))]) | overrides
    given |= {"image_size": image_size, "patch_size": patch_size, "num_classes": num_classes}
    return ViT(configure(ViTConfig, mixer=mixer, **given))


register_family("vit", vit, ViTConfig)


def _register_sizes(mixer: str) -> None:
    for size in SIZES:
        for patch in (16, 32, 56):
            register_model(
                f"{mixer}_vit_{size}_patch{patch}_224", vit,
                size=size, mixer=mixer, image_size=224, patch_size=patch,
            )  # fmt: skip


for_each_mixer(_register_sizes)
