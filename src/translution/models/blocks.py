"""The one transformer block, and the one place where the name of a mixer becomes a module."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ..modules.attention import (
    AlphaTranslution1d,
    AlphaTranslution2d,
    SelfAttention,
    Translution1d,
    Translution2d,
)
from ..modules.cache import Cache
from ..modules.convolution import Convolution2d
from ..modules.reduced import ReducedACmix2d

__all__ = [
    "IMAGE_MIXERS",
    "MIXERS",
    "SIZES",
    "Block",
    "Mixing",
    "Size",
    "choose",
    "head_dim_of",
    "input_shape",
    "mixers_of_layers",
]

# Mixers, and whether the model adds a learned absolute position to its tokens.
MIXERS = {
    "attention": True,
    "rotary": False,
    "bias": False,
    "convolution": False,
    "acmix": True,
    "translution": False,
    "alpha": False,
}
CHECKPOINTS = ("none", "selective", "full")

# Those that mix images only.
IMAGE_MIXERS = ("convolution", "acmix")


@dataclass(frozen=True)
class Size:
    """Width, number of blocks and heads of a model."""

    dim: int
    depth: int
    heads: int


SIZES = {
    "tiny": Size(192, 6, 3),
    "mini": Size(192, 12, 3),
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
}


def choose(name: str, value: str, known: Sequence[str]) -> str:
    """`value`, if it is known."""
    if value not in known:
        raise ValueError(f"{name}: got {value!r}, want one of {list(known)}")
    return value


def input_shape(config: Any) -> tuple[int, ...]:
    """Of one sample of a model: (context,) of a text, else (in_channels, height, width), for 224
    pixels where a model is for images of any size."""
    if hasattr(config, "context"):
        return (config.context,)
    return (config.in_channels, *getattr(config, "image_size", (224, 224)))


def head_dim_of(dim: int, heads: int, head_dim: int | None) -> int:
    """head_dim, or where it is not given dim / heads."""
    if head_dim is None:
        if dim % heads:
            raise ValueError(f"heads: got {heads}, want a divisor of dim {dim} (or give head_dim)")
        return dim // heads
    if head_dim < 1:
        raise ValueError(f"head_dim: got {head_dim}, want at least 1")
    return head_dim


@dataclass
class Mixing:
    """How the tokens of a model are mixed: the part of a configuration that all models share.

    mixer: one of `MIXERS`. relative: which of "qkv" have tables. relative_layers: only the first so
    many blocks use the mixer, those after it attention (rotary on images, plain on text); None is
    all. rank: of α's branch, per head. rotary: rotary positions too, on α's ordinary branch, or on
    the q and k that Translution shares (relative "v" or ""). window, dilation, buckets, init: as in
    Translution. kernel_size: of the mixers "convolution" and "acmix" (whose attention is global).
    checkpoint: what a block forgets going forward and computes again going back, in training:
    "none"; "selective", all but the results of matrix products and of the library's operators; or
    "full", everything but its input.
    """

    mixer: str = "translution"
    relative: str = "qkv"
    relative_layers: int | None = None
    rank: int = 8
    rotary: bool = False
    window: Any = None
    dilation: Any = 1
    buckets: Any = None
    init: str = "equal"
    kernel_size: int = 3
    dropout: float = 0.0
    checkpoint: str = "none"

    def make(
        self,
        mixer: str,
        dim: int,
        grid: tuple[int, ...],
        heads: int,
        head_dim: int | None,
        causal: bool = False,
        prefix: int = 0,
        prefix_queries: bool = False,
    ) -> nn.Module:
        """The token mixer of one block. Causality and geometry go to every mixer from here."""
        if mixer in IMAGE_MIXERS and causal:
            raise ValueError(f"mixer: {mixer!r} mixes images only")
        if mixer == "convolution":
            if prefix:
                raise ValueError("mixer: 'convolution' mixes images without a class token only")
            return Convolution2d(dim, grid, self.kernel_size)
        if mixer == "acmix":
            return ReducedACmix2d(
                dim, grid, heads, head_dim=head_dim, conv_kernel=self.kernel_size, prefix=prefix,
                prefix_queries=prefix_queries, dropout=self.dropout,
            )  # fmt: skip
        keywords: dict[str, Any] = {
            "heads": heads,
            "head_dim": head_dim,
            "causal": causal,
            "prefix": prefix,
            "prefix_queries": prefix_queries,
            "dropout": self.dropout,
            "window": self.window,
            "dilation": self.dilation,
            "buckets": self.buckets,
        }
        flat = len(grid) == 1
        if mixer in ("translution", "alpha"):
            keywords |= {"relative": self.relative, "init": self.init, "rotary": self.rotary}
        if mixer == "translution":
            return (Translution1d if flat else Translution2d)(dim, _one(grid), **keywords)
        if mixer == "alpha":
            keywords["rank"] = self.rank
            return (AlphaTranslution1d if flat else AlphaTranslution2d)(dim, _one(grid), **keywords)
        position = {"attention": "none"}.get(mixer, mixer)
        return SelfAttention(dim, grid, position=position, **keywords)


def _one(grid: tuple[int, ...]) -> Any:
    return grid[0] if len(grid) == 1 else grid


def mixers_of_layers(mixing: Mixing, depth: int, after: str) -> list[str]:
    """The mixer of each block: `mixing.mixer` in the first `relative_layers`, `after` then."""
    first = depth if mixing.relative_layers is None else mixing.relative_layers
    if not 0 <= first <= depth:
        raise ValueError(f"relative_layers: got {first}, want 0 to depth {depth}")
    return [mixing.mixer] * first + [after] * (depth - first)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); each norm before its branch.

    A mixer that answers for the prefix alone (`prefix_queries`) cuts the tokens to the prefix.
    `checkpoint`: as in `Mixing`.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        checkpoint: str = "none",
    ):
        super().__init__()
        self.checkpoint = choose("checkpoint", checkpoint, CHECKPOINTS)
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor, grid: tuple[int, ...], cache: Cache | None = None) -> Tensor:
        """`cache`: of a causal mixer; `x` are then the tokens after those that it has seen."""
        if self.checkpoint == "none" or not (self.training and torch.is_grad_enabled()):
            return self._forward(x, grid, cache)
        more: dict[str, Any] = {}
        if self.checkpoint == "selective":
            more["context_fn"] = _remembering
        return checkpoint(self._forward, x, grid, cache, use_reentrant=False, **more)

    def _forward(self, x: Tensor, grid: tuple[int, ...], cache: Cache | None) -> Tensor:
        more = {} if cache is None else {"cache": cache}  # not every mixer knows one
        y = self.mixer(self.norm1(x), grid=grid, **more)
        x = x[:, : y.shape[1]] + y
        return x + self.mlp(self.norm2(x))


# What costs enough to be kept: the rest (norms, activations, softmax, views) is cheap to repeat.
_KEPT = {
    torch.ops.translution.offset_scores.default,
    torch.ops.translution.offset_mix.default,
    torch.ops.translution.neighborhood_attention.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def _policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    keep = operator in _KEPT
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


_remembering = functools.partial(create_selective_checkpoint_contexts, _policy)
