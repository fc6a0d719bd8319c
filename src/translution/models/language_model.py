"""The causal language model, with any mixer."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._renamed import renamed_arguments
from ..modules.cache import Cache
from ..modules.checks import check_tensor
from .blocks import SIZES, Block, Mixing, mixers_of_blocks
from .configuration import check_choice, check_positive, configure, head_dim_of
from .mixers import for_each_mixer, mixer_names
from .pretrained import Pretrained
from .registry import register_family, register_model

__all__ = ["GPT", "GPTConfig", "gpt"]


@renamed_arguments(published="double_final_norm")
@dataclass
class GPTConfig(Mixing):
    """All options of a `GPT`.

    Args:
        context: the largest number of tokens that the model sees at once. An input may be longer
            with `buckets` and a mixer without learned absolute positions.
        vocab_size: the number of token ids.
        dim, depth, heads: channels of a token, number of blocks, number of heads.
        head_dim: channels of a head; the default is dim / heads.
        mlp_ratio: hidden channels of a block's MLP, as a multiple of dim.
        double_final_norm: whether two layer norms follow the last block, as in the published code,
            to use its weights. By default there is one.
        tie_head: whether the head's weight is that of the embedding, which then starts as the
            head's does.
        mixer, mixer_options, relative, relative_depth, rank, position, learned_positions,
            kv_heads, window, dilation, buckets, init, dropout, embedding_dropout,
            projection_dropout, activation_checkpointing: as in `Mixing`.

    Raises:
        ValueError: naming the option, what came and what is wanted.
    """

    context: int = 1024
    vocab_size: int = 50257
    dim: int = 192
    depth: int = 6
    heads: int = 3
    head_dim: int | None = None
    mlp_ratio: float = 4.0
    double_final_norm: bool = False
    tie_head: bool = False

    def __post_init__(self) -> None:
        self.check_mixing(causal=True)
        check_positive(self, "context", "vocab_size", "dim", "depth", "heads")
        self.head_dim = head_dim_of(self.dim, self.heads, self.head_dim)


class GPT(Pretrained):
    """A causal language model: token ids [batch, length] -> logits [batch, length, vocab_size].

    Args:
        config: all options. `gpt` fills them in for a named size.
    """

    task = "text-generation"

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.positions: nn.Parameter | None = None
        if c.adds_learned_positions:
            self.positions = nn.Parameter(torch.randn(1, c.context, c.dim) * 0.02)
        self.embedding_dropout = nn.Dropout(c.embedding_dropout)
        self.blocks = nn.ModuleList(
            Block(
                c.dim,
                c.make(mixer, c.dim, (c.context,), c.heads, c.head_dim, causal=True),
                c.mlp_ratio,
                c.dropout,
                c.activation_checkpointing,
                c.projection_dropout,
            )
            for mixer in mixers_of_blocks(c, c.depth, after="attention")
        )
        self.norm: nn.Module = nn.LayerNorm(c.dim)
        if c.double_final_norm:
            self.norm = nn.Sequential(nn.LayerNorm(c.dim), nn.LayerNorm(c.dim))
        self.head = nn.Linear(c.dim, c.vocab_size, bias=False)
        if c.tie_head:
            self.embed.weight = self.head.weight

    def forward(
        self,
        ids: Tensor,
        caches: Sequence[Cache] | None = None,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """The logits of the token that follows each token, [batch, length, vocab_size].

        Args:
            ids: int64 [batch, length], at most `context` tokens long.
            caches: the result of `make_caches`. `ids` then continues the sequences of earlier calls
                with the same caches, and sees their tokens. It requires `torch.no_grad()`.
            mask: boolean [batch, tokens], also those in the caches: False for padding, which no
                token sees and which takes no learned position. The tokens of a text follow each
                other, so padding comes before or after it. The logits of padding mean nothing.
            documents: int64 [batch, length], a number for each token: neighbours with equal numbers
                belong to one document. No token sees another document, and learned positions begin
                anew in each, so that each document has the logits that it has alone. (Offsets and
                rotary positions are differences of places, which are the same within a document
                wherever it begins.) Padding is a document of its own. It excludes caches and mask.

        Raises:
            ValueError: ids, a mask or documents of another dtype or shape, more tokens than the
                context, caches that do not belong together, documents beside caches or a mask, or
                a mixer that takes no mask.
        """
        return self.head(self.hidden(ids, caches, mask, documents))

    def hidden(
        self,
        ids: Tensor,
        caches: Sequence[Cache] | None = None,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """The features that `head` computes the logits from, [batch, length, dim].

        Arguments and errors are those of `forward`.
        """
        check_tensor("ids", ids, "int64 (batch, length)")
        if ids.ndim != 2 or ids.dtype not in _INTS or not ids.shape[1]:
            raise ValueError(
                f"ids: got {ids.dtype} of shape {tuple(ids.shape)}, want int64 (batch, length)"
            )
        each: Sequence[Cache | None] = [None] * len(self.blocks) if caches is None else caches
        seen = {0 if cache is None else cache.length for cache in each}
        if len(each) != len(self.blocks) or len(seen) != 1:
            raise ValueError(
                f"caches: got {len(each)} that have seen {sorted(seen)} tokens, want those of "
                f"make_caches, one for each of the {len(self.blocks)} blocks"
            )
        x = self.embed(ids)
        (start,), length = seen, int(ids.shape[1])
        places: Tensor | None = None  # in a text; None is 0, 1, 2, and so on
        seen_keys: Tensor | None = None  # [batch, 1, queries or 1, all tokens so far]
        if documents is not None:
            if caches is not None or mask is not None:
                other = "caches" if mask is None else "a mask"
                raise ValueError(f"documents: got {other} as well, want one of them")
            _check_numbers("documents", documents, (len(ids), length), _INTS, "int64")
            self._check_mixers("documents")
            places, seen_keys = _within_documents(documents)
        if mask is not None:
            _check_numbers("mask", mask, (len(ids), start + length), (torch.bool,), "boolean")
            self._check_mixers("mask")
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
            seen_keys = mask[:, None, None]
        if self.positions is not None:
            if start + length > self.config.context:
                raise ValueError(
                    f"ids: got {start + length} tokens, want at most the context "
                    f"{self.config.context}"
                )
            if places is None:
                x = x + self.positions[:, start : start + length]
            else:
                x = x + self.positions[0, places]
        x = self.embedding_dropout(x)
        for block, cache in zip(self.blocks, each, strict=True):
            held = 0 if cache is None else cache.held
            keys = None if seen_keys is None else seen_keys[..., -(held + length) :]
            x = block(x, (length,), cache, keys)
        return self.norm(x)

    def make_caches(self) -> list[Cache]:
        """Empty caches, one for each block, for a sequence that is given in parts.

        Raises:
            ValueError: a mixer has no caches.
        """
        for mixer in self._mixers():
            if not hasattr(mixer, "make_cache"):
                name = type(mixer).__name__
                raise ValueError(f"cache: {name} has no make_cache, want False (--no-cache)")
        return [mixer.make_cache() for mixer in self._mixers()]

    @property
    def unbounded(self) -> bool:
        """Whether a sequence may be longer than the context.

        It may if there are no learned positions, and each block has buckets or a window that fits
        into its tables.
        """
        return self.positions is None and all(
            hasattr(mixer, "layout") and mixer.layout.unbounded for mixer in self._mixers()
        )

    def _mixers(self) -> list[Any]:
        return [block.mixer for block in self.blocks]

    def _check_mixers(self, name: str) -> None:
        """Check that all mixers take a mask. (Tracing cannot look at signatures.)"""
        for mixer in () if torch.compiler.is_compiling() else self._mixers():
            parameters = inspect.signature(mixer.forward).parameters.values()
            if not any(p.name == "mask" or p.kind is p.VAR_KEYWORD for p in parameters):
                kind = type(mixer).__name__
                raise ValueError(f"{name}: got a tensor, want None: the mixer {kind} takes no mask")


_INTS = (torch.int64, torch.int32)


def _check_numbers(
    name: str, x: Tensor, shape: tuple[int, int], dtypes: Sequence[torch.dtype], kind: str
) -> None:
    check_tensor(name, x, f"{kind} (batch, tokens)")
    if x.dtype not in dtypes or tuple(x.shape) != shape:
        raise ValueError(
            f"{name}: got {x.dtype} of shape {tuple(x.shape)}, want {kind} (batch, tokens) {shape}"
        )


def _within_documents(documents: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each token in its document, int64 [batch, tokens], and whether a query and a key
    are in the same one, boolean [batch, 1, tokens, tokens]."""
    token = torch.arange(documents.shape[1], device=documents.device)
    differs = documents[:, 1:] != documents[:, :-1]
    # the first token of each token's document: a number may return in a later document
    first = (differs * token[1:]).cummax(1).values
    first = torch.cat([torch.zeros_like(documents[:, :1], dtype=torch.int64), first], 1)
    return token - first, (first[:, :, None] == first[:, None])[:, None]


def gpt(
    size: str = "tiny",
    mixer: str = "translution",
    context: int = 1024,
    vocab_size: int = 50257,
    **overrides: Any,
) -> GPT:
    """A causal language model of a named size ("tiny", "mini", "small", "base", "large").

    Args:
        size: dim, depth and heads, from `translution.models.blocks.SIZES`.
        mixer, context, vocab_size: as in `GPTConfig`.
        overrides: any other option of `GPTConfig`, such as dim, depth or relative.

    Raises:
        ValueError: an unknown size, mixer or option, or values that do not fit.
    """
    given = vars(SIZES[check_choice("size", size, list(SIZES))]) | overrides
    return GPT(configure(GPTConfig, mixer=mixer, context=context, vocab_size=vocab_size, **given))


register_family("gpt", gpt, GPTConfig)


def _register_sizes(mixer: str) -> None:
    for size in SIZES if mixer in mixer_names(causal=True) else ():
        register_model(f"{mixer}_gpt_{size}", gpt, size=size, mixer=mixer, context=1024)


for_each_mixer(_register_sizes)
