"""The transformer block of ViT and GPT, and how the name of a mixer becomes a module."""

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

from .._renamed import renamed_arguments
from ..layouts import OptionalSizes, Sizes
from ..modules.alpha import AlphaTranslution1d, AlphaTranslution2d
from ..modules.attention import SelfAttention, position_of
from ..modules.cache import Cache
from ..modules.convolution import Convolution2d
from ..modules.reduced import ReducedACmix2d
from ..modules.translution import Translution1d, Translution2d
from .configuration import check_choice, hidden_channels

__all__ = [
    "ACTIVATION_CHECKPOINTING",
    "IMAGE_MIXERS",
    "MIXERS",
    "SIZES",
    "TABLE_MIXERS",
    "Block",
    "Mixing",
    "Size",
    "mixers_of_blocks",
    "unused_options",
]

MIXERS = ("attention", "rotary", "bias", "convolution", "acmix", "translution", "alpha")
"""The names of token mixers. "rotary" and "bias" are attention with that kind of position."""

IMAGE_MIXERS = ("convolution", "acmix")
"""The mixers that cannot be causal, and so mix images only."""

TABLE_MIXERS = ("translution", "alpha")
"""The mixers with projections that depend on the offset."""

ACTIVATION_CHECKPOINTING = ("none", "selective", "full")

GEOMETRY = ("window", "dilation", "buckets")
"""The options of `Mixing` that belong to a `Layout`."""


@dataclass(frozen=True)
class Size:
    """The dimensions of a named model size."""

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


def unused_options(mixer: str) -> set[str]:
    """The options of `Mixing` that a mixer does not use, and that must have their defaults."""
    unused = {"conv_kernel_size"} if mixer not in IMAGE_MIXERS else set(GEOMETRY)
    unused |= {"rank"} if mixer != "alpha" else set()
    return unused | ({"relative", "init"} if mixer not in TABLE_MIXERS else set())


def _position_of(rotary: bool, given: dict[str, Any]) -> dict[str, Any]:
    """The earlier option `rotary` had an effect on mixers with tables only."""
    has_tables = given.get("mixer", Mixing.mixer) in TABLE_MIXERS
    return position_of(rotary) if has_tables else {}


@renamed_arguments(
    relative_layers="relative_depth",
    rotary=_position_of,
    kernel_size="conv_kernel_size",
    checkpoint="activation_checkpointing",
)
@dataclass
class Mixing:
    """How a model mixes its tokens: the options that ViT and GPT have in common.

    Args:
        mixer: one of `MIXERS`.
        relative: which of "q", "k" and "v" have tables, in Translution and α-Translution.
        relative_depth: the number of blocks, from the first, that use the mixer. The blocks after
            them use attention, with rotary positions in a ViT and without in a GPT. None is all.
        rank: channels per head of α-Translution's relative branch.
        position: what the mixer adds to its queries and keys: "none", or "rotary", which
            Translution allows where q and k have no table. The mixer "attention" also takes "bias".
        learned_positions: whether learned absolute positions are added to the tokens. None adds
            them for the mixers "acmix" and "attention", the latter with position "none".
        window, dilation, buckets, init: as in `Translution2d`.
        conv_kernel_size: the kernel size of the mixers "convolution" and "acmix".
        dropout: the probability with which attention weights and outputs of the MLPs are dropped.
        activation_checkpointing: what a block recomputes in the backward pass instead of storing
            it. "none"; "selective": all but the results of matrix products and of this library's
            operators; "full": everything but its input.
    """

    mixer: str = "translution"
    relative: str = "qkv"
    relative_depth: int | None = None
    rank: int = 8
    position: str = "none"
    learned_positions: bool | None = None
    window: OptionalSizes = None
    dilation: Sizes = 1
    buckets: OptionalSizes = None
    init: str = "equal"
    conv_kernel_size: int = 3
    dropout: float = 0.0
    activation_checkpointing: str = "none"

    def check_mixing(self, mixers: Sequence[str]) -> None:
        """Check the options that are not checked by the modules themselves.

        An option that the mixer does not use must have its default.

        Raises:
            ValueError: naming the option, what came and what is wanted.
        """
        check_choice("mixer", self.mixer, mixers)
        check_choice("position", self.position, self._positions())
        for name in sorted(unused_options(self.mixer)):
            value, default = getattr(self, name), getattr(Mixing, name)
            if value != default:
                raise ValueError(
                    f"{name}: got {value!r}, but the mixer {self.mixer!r} does not use it; want "
                    f"{default!r}"
                )
        name = "activation_checkpointing"
        check_choice(name, self.activation_checkpointing, ACTIVATION_CHECKPOINTING)

    @classmethod
    def without_unused(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The options without those that their mixer does not use."""
        unused = unused_options(options.get("mixer", cls.mixer))
        return {name: value for name, value in options.items() if name not in unused}

    def _positions(self) -> list[str]:
        """The values of `position` that fit the mixer."""
        if self.mixer == "attention":
            return ["none", "rotary", "bias"]
        if self.mixer in ("rotary", "bias"):
            return ["none", self.mixer]
        return ["none"] if self.mixer in IMAGE_MIXERS else ["none", "rotary"]

    @property
    def adds_learned_positions(self) -> bool:
        """Whether the model adds learned absolute positions to its tokens."""
        if self.learned_positions is not None:
            return self.learned_positions
        plain_attention = self.mixer == "attention" and self.position == "none"
        return plain_attention or self.mixer == "acmix"

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
        """The token mixer of one block, with causality and geometry as given.

        Raises:
            ValueError: the mixer cannot be causal, or cannot have prefix tokens.
        """
        if mixer in IMAGE_MIXERS and causal:
            raise ValueError(f"mixer: {mixer!r} mixes images only")
        if mixer == "convolution":
            if prefix:
                raise ValueError("mixer: 'convolution' mixes images without a class token only")
            return Convolution2d(dim, grid, self.conv_kernel_size)
        if mixer == "acmix":
            return ReducedACmix2d(
                dim, grid, heads, head_dim=head_dim, conv_kernel_size=self.conv_kernel_size,
                prefix=prefix, prefix_queries=prefix_queries, dropout=self.dropout,
            )  # fmt: skip
        options: dict[str, Any] = {
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
        if mixer in ("rotary", "bias"):
            return SelfAttention(dim, grid, position=mixer, **options)
        # blocks after `relative_depth` have another mixer than the one that `position` is for
        options["position"] = self.position if mixer == self.mixer else "none"
        if mixer == "attention":
            return SelfAttention(dim, grid, **options)
        options |= {"relative": self.relative, "init": self.init}
        one_axis = len(grid) == 1
        if mixer == "translution":
            return (Translution1d if one_axis else Translution2d)(dim, grid, **options)
        check_choice("mixer", mixer, ["alpha"])
        options["rank"] = self.rank
        return (AlphaTranslution1d if one_axis else AlphaTranslution2d)(dim, grid, **options)


def mixers_of_blocks(mixing: Mixing, depth: int, after: str) -> list[str]:
    """The mixer of each block: `mixing.mixer` for the first `relative_depth`, then `after`."""
    first = depth if mixing.relative_depth is None else mixing.relative_depth
    if not 0 <= first <= depth:
        raise ValueError(f"relative_depth: got {first}, want 0 to depth {depth}")
    return [mixing.mixer] * first + [after] * (depth - first)


class Block(nn.Module):
    """A transformer block: x + mixer(norm(x)), then x + mlp(norm(x)).

    After a mixer with `prefix_queries` only the prefix tokens remain.

    Args:
        dim: channels of a token.
        mixer: maps tokens [batch, tokens, dim] on a `grid` to tokens.
        mlp_ratio: hidden channels of the MLP, as a multiple of dim.
        dropout: the probability with which an output of the MLP is dropped.
        activation_checkpointing: as in `Mixing`.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        activation_checkpointing: str = "none",
    ):
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        hidden = hidden_channels(dim, mlp_ratio)
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

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, ...],
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Tokens [batch, tokens, dim] on a grid -> the same shape, or the prefix only.

        With the `cache` of a causal mixer, `x` holds the tokens that follow the cached ones. A
        `mask` is one of the mixer.
        """
        if self.activation_checkpointing == "none" or not (
            self.training and torch.is_grad_enabled()
        ):
            return self._forward(x, grid, cache, mask)
        more: dict[str, Any] = {}
        if self.activation_checkpointing == "selective":
            more["context_fn"] = _selective_contexts
        return checkpoint(self._forward, x, grid, cache, mask, use_reentrant=False, **more)

    def _forward(
        self, x: Tensor, grid: tuple[int, ...], cache: Cache | None, mask: Tensor | None
    ) -> Tensor:
        given = {"cache": cache, "mask": mask}  # not every mixer takes them
        more = {name: value for name, value in given.items() if value is not None}
        y = self.mixer(self.norm1(x), grid=grid, **more)
        x = x[:, : y.shape[1]] + y
        return x + self.mlp(self.norm2(x))


# Operators whose results are stored: they cost much. All others (norms, activations, softmax,
# views) are cheap to recompute.
_STORED = {
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
    store = operator in _STORED
    return CheckpointPolicy.MUST_SAVE if store else CheckpointPolicy.PREFER_RECOMPUTE


_selective_contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
