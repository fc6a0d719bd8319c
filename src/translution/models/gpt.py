"""The causal language model, with any mixer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.cache import Cache
from .blocks import (
    CHECKPOINTS,
    IMAGE_MIXERS,
    MIXERS,
    SIZES,
    Block,
    Mixing,
    choose,
    head_dim_of,
    mixers_of_layers,
)
from .pretrained import Pretrained
from .vit import configure

__all__ = ["GPT", "GPTConfig", "gpt"]


@dataclass
class GPTConfig(Mixing):
    """Everything that a `GPT` is made from. context: the most tokens it sees at once (with
    `buckets` and a mixer without absolute positions an input may be longer). published: end
    in two layer norms, as the published code does, to use its weights."""

    context: int = 1024
    vocab_size: int = 50257
    dim: int = 192
    depth: int = 6
    heads: int = 3
    head_dim: int | None = None
    mlp_ratio: float = 4.0
    published: bool = False

    def __post_init__(self) -> None:
        choose("checkpoint", self.checkpoint, CHECKPOINTS)
        choose("mixer", self.mixer, [name for name in MIXERS if name not in IMAGE_MIXERS])
        for name in ("context", "vocab_size", "dim", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, want at least 1")
        self.head_dim = head_dim_of(self.dim, self.heads, self.head_dim)


class GPT(Pretrained):
    """Token ids [batch, length] -> logits [batch, length, vocab_size]; causal in every block.

    Args:
        config: all options; `gpt` makes one from a size's name.
    """

    task = "text-generation"

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.positions: nn.Parameter | None = None
        if MIXERS[c.mixer]:
            self.positions = nn.Parameter(torch.randn(1, c.context, c.dim) * 0.02)
        self.blocks = nn.ModuleList(
            Block(
                c.dim,
                c.make(mixer, c.dim, (c.context,), c.heads, c.head_dim, causal=True),
                c.mlp_ratio,
                c.dropout,
                c.checkpoint,
            )
            for mixer in mixers_of_layers(c, c.depth, after="attention")
        )
        self.norm: nn.Module = nn.LayerNorm(c.dim)
        if c.published:
            self.norm = nn.Sequential(nn.LayerNorm(c.dim), nn.LayerNorm(c.dim))
        self.head = nn.Linear(c.dim, c.vocab_size, bias=False)

    def forward(self, ids: Tensor, caches: Sequence[Cache] | None = None) -> Tensor:
        """Logits of the token after each.

        Args:
            ids: int64 [batch, length]; at most the context, shorter inputs are fine.
            caches: of `make_caches`. `ids` then follow those of earlier calls with them, and see
                them too; without gradients.

        Returns:
            [batch, length, vocab_size].

        Raises:
            ValueError: other ids, more tokens than the context, or caches of another use.
        """
        return self.head(self.hidden(ids, caches))

    def hidden(self, ids: Tensor, caches: Sequence[Cache] | None = None) -> Tensor:
        """What `head` makes the logits of: [batch, length, dim]; else as `forward`."""
        if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.shape[1]:
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
        if self.positions is not None:
            if start + length > self.config.context:
                raise ValueError(
                    f"ids: got {start + length} tokens, want at most the context "
                    f"{self.config.context}"
                )
            x = x + self.positions[:, start : start + length]
        for block, cache in zip(self.blocks, each, strict=True):
            x = block(x, (length,), cache)
        return self.norm(x)

    def make_caches(self) -> list[Cache]:
        """Empty memories, one for each block, for a text that is given in parts."""
        return [mixer.make_cache() for mixer in self._mixers()]

    @property
    def unbounded(self) -> bool:
        """Whether a text may be longer than the context: there are no absolute positions, and each
        block has buckets, or a window that its tables hold whole."""
        return self.positions is None and all(m.layout.unbounded for m in self._mixers())

    def _mixers(self) -> list[Any]:
        return [block.mixer for block in self.blocks]


def gpt(
    size: str = "tiny",
    mixer: str = "translution",
    context: int = 1024,
    vocab_size: int = 50257,
    **overrides: Any,
) -> GPT:
    """A causal language model of a named size ("tiny", "mini", "small", "base", "large").

    Any field of `GPTConfig` can be given, such as `dim`, `depth`, `heads`, `relative_layers`.

    Raises:
        ValueError: an unknown size, mixer or field, or values that don't fit.
    """
    given = vars(SIZES[choose("size", size, list(SIZES))]) | overrides
    return GPT(configure(GPTConfig, mixer=mixer, context=context, vocab_size=vocab_size, **given))
