"""The transformer block of ViT and GPT, and how the name of a mixer becomes a module."""

from __future__ import annotations

import functools
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
from ..modules.attention import position_of
from ..modules.cache import Cache
from ..modules.convolution import Convolution2d
from ..modules.reduced import ReducedACmix2d
from ..modules.self_attention import SelfAttention
from ..modules.translution import Translution1d, Translution2d
from .configuration import check_choice, hidden_channels
from .mixers import (
    GEOMETRY,
    IMAGE_MIXERS,
    MIXERS,
    TABLE_MIXERS,
    mixer_names,
    own_mixer,
    takes_prefix,
)

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

ACTIVATION_CHECKPOINTING = ("none", "selective", "full")


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
    own = own_mixer(mixer)
    if own is not None:
        unused = {name for name in GEOMETRY if not own.takes(name)}
        return unused | {"conv_kernel_size", "rank", "relative", "init", "kv_heads"}
    unused = {"conv_kernel_size"} if mixer not in IMAGE_MIXERS else {*GEOMETRY, "kv_heads"}
    unused |= {"mixer_options"}
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
        mixer: one of `MIXERS`, or the name of a mixer of your own (`register_mixer`).
        mixer_options: further arguments for a mixer of your own, by name.
        relative: which of "q", "k" and "v" have tables, in Translution and α-Translution.
        relative_depth: the number of blocks, from the first, that use the mixer. The blocks after
            them use attention, with rotary positions in a ViT and without in a GPT. None is all.
        rank: channels per head of α-Translution's relative branch.
        position: what the mixer adds to its queries and keys: "none", or "rotary", which
            Translution allows where q and k have no table. The mixer "attention" also takes "bias".
        learned_positions: whether learned absolute positions are added to the tokens. None adds
            them for the mixers "acmix" and "attention", the latter with position "none", and for
            mixers of your own that ask for them.
        kv_heads: the number of key and value heads, as in `SelfAttention`; None is `heads`. With
            Translution it requires `relative` "q" or "". A mixer of your own may have an option of
            this name in `mixer_options`.
        window, dilation, buckets, init: as in `Translution2d`.
        conv_kernel_size: the kernel size of the mixers "convolution" and "acmix".
        dropout: the probability with which attention weights and outputs of the MLPs are dropped.
        embedding_dropout, projection_dropout: the same for the tokens before the first block, and
            for the outputs of the mixers.
        activation_checkpointing: what a block recomputes in the backward pass instead of storing
            it. "none"; "selective": all but the results of matrix products and of this library's
            operators; "full": everything but its input.
    """

    mixer: str = "translution"
    mixer_options: dict[str, Any] | None = None
    relative: str = "qkv"
    relative_depth: int | None = None
    rank: int = 8
    position: str = "none"
    learned_positions: bool | None = None
    kv_heads: int | None = None
    window: OptionalSizes = None
    dilation: Sizes = 1
    buckets: OptionalSizes = None
    init: str = "equal"
    conv_kernel_size: int = 3
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    projection_dropout: float = 0.0
    activation_checkpointing: str = "none"

    def check_mixing(self, causal: bool = False) -> None:
        """Check the options that are not checked by the modules themselves.

        An option that the mixer does not use must have its default.

        Args:
            causal: whether the model is causal.

        Raises:
            ValueError: naming the option, what came and what is wanted.
        """
        own = own_mixer(self.mixer)
        if own is not None and causal and not own.causal:
            raise ValueError(
                f"mixer: {self.mixer!r} mixes images only; one that can be causal is registered "
                "with causal=True"
            )
        if self.mixer not in (names := mixer_names(causal)):
            raise ValueError(
                f"mixer: got {self.mixer!r}, want one of {names}, or one of your own: "
                "register_mixer, and on the command line --import FILE, make it known"
            )
        check_choice("position", self.position, self._positions())
        for name in sorted(unused_options(self.mixer)):
            value, default = getattr(self, name), getattr(Mixing, name)
            if value != default:
                raise ValueError(
                    f"{name}: got {value!r}, but the mixer {self.mixer!r} does not use it; want "
                    f"{default!r}"
                )
        if own is not None:
            own.check_options(self.mixer_options or {})
        for name in ("dropout", "embedding_dropout", "projection_dropout"):
            if not 0 <= getattr(self, name) < 1:
                value = getattr(self, name)
                raise ValueError(f"{name}: got {value}, want at least 0 and less than 1")
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
        return ["none", "rotary"] if self.mixer in TABLE_MIXERS else ["none"]

    @property
    def adds_learned_positions(self) -> bool:
        """Whether the model adds learned absolute positions to its tokens."""
        if self.learned_positions is not None:
            return self.learned_positions
        own = own_mixer(self.mixer)
        if own is not None:
            return own.learned_positions
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
        if prefix and not takes_prefix(mixer):
            raise ValueError(f"mixer: {mixer!r} mixes images without a class token only")
        if mixer == "convolution":
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
        own = own_mixer(mixer)
        if own is not None:
            options |= {"dim": dim, "grid": grid}
            return own.build(options, self.mixer_options or {})
        options["kv_heads"] = self.kv_heads
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
        projection_dropout: the probability with which an output of the mixer is dropped.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        activation_checkpointing: str = "none",
        projection_dropout: float = 0.0,
    ):
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        hidden = hidden_channels(dim, mlp_ratio)
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.mixer_dropout = nn.Dropout(projection_dropout)
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
        x = x[:, : y.shape[1]] + self.mixer_dropout(y)
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
