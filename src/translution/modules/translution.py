"""Translution: attention whose query, key and value projections depend on the offset."""

from __future__ import annotations

import torch
from torch import Tensor

from .._renamed import foreign_arguments, renamed_arguments
from ..layouts import Layout, OptionalSizes, Sizes
from ..operands import as_operand
from .attention import FOREIGN, RENAMED, Attention, check_relative
from .cache import Cache, append_to_cache

__all__ = ["Translution1d", "Translution2d", "Translution3d"]


@renamed_arguments(**RENAMED)
@foreign_arguments(**FOREIGN, rel_pos_bias="relative, whose tables replace it")
class _Translution(Attention):
    """Attention whose query, key and value projections may depend on the offset of two tokens.

    q_ij = x_i Wq[c], k_ij = x_j Wk[c], v_ij = x_j Wv[c], where c is the offset class of the pair
    (i, j): on the grid, the number of their offset position(i) - position(j). Then
    s_ij = q_ij · k_ij / sqrt(head_dim) and y_i = Σ_j softmax_j(s_i)_j v_ij (Translution,
    section 3). No position embedding is needed beside it.

    Args:
        dim: channels of a token.
        grid: tokens per axis that the tables are made for (an int for one axis, or for all).
            Smaller inputs use a part of the tables.
        heads, head_dim: the number of heads and their channels; head_dim defaults to dim / heads.
        relative: which of "q", "k" and "v" have tables; any subset. "" is self-attention.
        causal: a query sees only keys at or before it (one axis only).
        window: the largest offset that is seen, per axis, in steps of `dilation`. None sets no
            limit.
        dilation: only offsets that are multiples of this number are seen, per axis.
        buckets: the number of matrices on each side of offset 0, per axis. Near offsets have one
            each and farther ones share them in groups of growing size, which makes tables small and
            allows inputs of any length. None gives every offset its own matrix.
        prefix: the number of tokens before the grid that have no position, such as a class token.
            Pairs with them have matrices of their own.
        prefix_queries: only the prefix tokens are queries, as in a last layer of which only the
            class token is read.
        dropout: the probability with which an attention weight is dropped in training.
        qkv_bias: whether the query, key and value projections have a bias (one per class in a
            table).
        init: how tables start, one of `translution.modules.INITS`; "equal" makes the new layer
            equal to self-attention.
        position: "none", or "rotary" for rotary positions on q and k where neither has a table.
        kv_heads: the number of key and value heads, as in `SelfAttention`, where neither k nor v
            has a table. (With tables, all heads of a pair are computed at once. A table for fewer
            heads would be repeated for that: it would save weights, but no time, and nothing in
            the cache, which holds the layer's inputs then.)
        device, dtype: of the parameters, as in torch's own modules.

    Attributes:
        layout: the `Layout`; `layout.index` is the class of each pair.
        q_proj, k_proj, v_proj: a table with `.weight` [classes, dim, heads · head_dim], or an
            nn.Linear.
        o_proj: an nn.Linear with bias.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """

    def __init__(
        self,
        dim: int,
        grid: Sizes,
        heads: int = 8,
        head_dim: int | None = None,
        relative: str = "qkv",
        causal: bool = False,
        window: OptionalSizes = None,
        dilation: Sizes = 1,
        buckets: OptionalSizes = None,
        prefix: int = 0,
        prefix_queries: bool = False,
        dropout: float = 0.0,
        qkv_bias: bool = False,
        init: str = "equal",
        position: str = "none",
        kv_heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        relative = check_relative(relative)
        if position == "rotary" and set(relative) & set("qk"):
            raise ValueError(
                f"position: got 'rotary' with relative={relative!r}; a table for q or k already "
                "contains every rotation by the offset, so want 'none', or relative 'v' or ''"
            )
        super().__init__(
            dim, grid, heads, head_dim, position=position, causal=causal, window=window,
            dilation=dilation, buckets=buckets, prefix=prefix, prefix_queries=prefix_queries,
            dropout=dropout, kv_heads=kv_heads,
        )  # fmt: skip
        self.relative = relative
        self.make_projections(relative, qkv_bias, init, device, dtype)

    def score(self, query: Tensor, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        q, k = self.project_query_key(query, x, layout, cache)
        k = self.repeat_heads(k)
        return self.primitives.scores(q, k, layout, heads=self.heads, scale=self.scale)

    def mix(self, a: Tensor, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        v = as_operand(self.v_proj(x))
        v = append_to_cache(cache, "v" if v.weight is None else "x", v)
        return self.primitives.mix(a, self.repeat_heads(v), layout)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relative={self.relative!r}"


class Translution1d(_Translution):
    __doc__ = _Translution.__doc__
    axes = 1


class Translution2d(_Translution):
    __doc__ = _Translution.__doc__
    axes = 2


class Translution3d(_Translution):
    __doc__ = _Translution.__doc__
    axes = 3
