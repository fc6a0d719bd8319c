"""The operators as modules: self-attention, Translution and α-Translution, on 1 to 3 axes.

All share one skeleton, `Attention`: find the layout of the input, project, score, softmax, mix,
project out. They differ in which projections are tables.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import masked_softmax, offset_scores
from ..functional.row import row_mix, row_scores
from ..layouts import Layout
from .cache import Cache, remember
from .checks import check_dtype, check_int
from .positions import RelativeBias, check_rotary, rotate, turns
from .projections import Projected, projection

__all__ = [
    "AlphaTranslution1d",
    "AlphaTranslution2d",
    "SelfAttention",
    "Translution1d",
    "Translution2d",
    "Translution3d",
]

Sizes = int | Sequence[int]


class Primitives:
    """What an attention with tables computes its pairs with. Where the classes are divided over
    processes, `translution.interop.parallel` puts its own in their place."""

    scores = staticmethod(row_scores)
    softmax = staticmethod(masked_softmax)
    mix = staticmethod(row_mix)

    @staticmethod
    def weights(a: Tensor) -> Tensor:
        """The weights of all pairs, from what `softmax` gave."""
        return a


class Attention(nn.Module):
    """The skeleton: subclasses say how scores and mix are made (or replace `attend`)."""

    axes: int | None = None  # None: any
    primitives: Any = Primitives()
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def __init__(
        self,
        dim: int,
        grid: Sizes,
        heads: int = 8,
        head_dim: int | None = None,
        dropout: float = 0.0,
        rotary: bool = False,
        **layout: Any,
    ):
        super().__init__()
        check_int("dim", dim, 1)
        check_int("heads", heads, 1)
        if head_dim is None:
            if dim % heads:
                raise ValueError(
                    f"heads: got {heads}, want a divisor of dim {dim} (or give head_dim)"
                )
            head_dim = dim // heads
        check_int("head_dim", head_dim, 1)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: got {dropout}, want at least 0 and less than 1")
        if self.axes is not None and isinstance(grid, int):
            grid = (grid,) * self.axes
        self.layout = Layout(cast(Any, grid), **layout)
        if self.axes is not None and len(self.layout.grid) != self.axes:
            raise ValueError(f"grid: got {grid}, want {self.axes} sizes (or one int for all)")
        if rotary:
            check_rotary(head_dim, len(self.layout.grid))
        self.dim, self.heads, self.head_dim = dim, heads, head_dim
        self.dropout, self.rotary = dropout, rotary
        self.scale = 1 / math.sqrt(head_dim)

    def forward(
        self,
        x: Tensor,
        grid: Sizes | None = None,
        mask: Tensor | None = None,
        return_weights: bool = False,
        cache: Cache | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Mix the tokens.

        Args:
            x: [batch, prefix + tokens, dim], the prefix first, the grid row-major.
            grid: tokens per axis of this input; default, on one axis the input's length, else the
                grid the layer was made for.
            mask: boolean, True = may look, broadcastable to [batch, heads, queries, keys]. A row
                that may look nowhere yields zeros before the output projection.
            return_weights: also return the attention weights.
            cache: of `make_cache`. `x` are then the tokens after those that it has seen: they see
                themselves and what the cache holds, and join it. Without gradients, and no mask.

        Returns:
            [batch, queries, dim], queries being all tokens (with `prefix_queries` the prefix
            alone); with `return_weights` also the weights [batch, heads, queries, keys], with a
            cache the keys being what it held and `x`.

        Raises:
            ValueError: naming the argument, what came and what is wanted.
        """
        layout = self._layout(x, grid)
        if cache is not None and cache.length:
            layout = _after(layout.key, cache.held, int(x.shape[1]))
        if mask is not None:
            if cache is not None:
                raise ValueError("mask: got one with a cache, want either alone")
            _check_mask(mask, (x.shape[0], self.heads, layout.n_queries, layout.n_keys))
            mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        query = x[:, : layout.prefix] if layout.prefix_queries else x
        y, weights = self.attend(query, x, layout, mask, return_weights, cache)
        if cache is not None:
            cache.advance(x.shape[1])
        y = self.o_proj(y)
        return (y, cast(Tensor, weights)) if return_weights else y

    def make_cache(self) -> Cache:
        """An empty memory for this layer.

        Raises:
            ValueError: a layer that is not causal, or has prefix tokens.
        """
        if not self.layout.causal or self.layout.prefix:
            raise ValueError(
                f"cache: got a layer with causal={self.layout.causal} and {self.layout.prefix} "
                "prefix tokens, want a causal one without"
            )
        return Cache(self.layout.reach[0])

    def attend(
        self, query: Tensor, x: Tensor, layout: Layout, mask: Tensor | None, return_weights: bool,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(mixed [batch, queries, heads * head_dim], weights): through the two primitives."""
        s = self.score(query, x, layout, cache)
        a = self.primitives.softmax(s, mask, layout.may_be_empty)
        y = self.mix(F.dropout(a, self.dropout, self.training), x, layout, cache)
        return y, self.primitives.weights(a) if return_weights else None

    def score(self, query: Tensor, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        raise NotImplementedError

    def mix(self, a: Tensor, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        raise NotImplementedError

    def shared_qk(
        self, query: Tensor, x: Tensor, layout: Layout, cache: Cache | None = None
    ) -> tuple[Projected, Projected]:
        """The query and key projections, turned by their positions where `rotary` says so; with
        a cache the keys that it holds come first."""
        q, k = self.q_proj(query), self.k_proj(x)
        if self.rotary:  # before they are held: a key is turned once
            k_heads = self.split(k.x)
            turn = turns(k_heads, layout, 0 if cache is None else cache.dropped)
            q = Projected(self.join(rotate(self.split(q.x), *turn)))
            k = Projected(self.join(rotate(k_heads, *turn)))
        return q, remember(cache, "k" if k.weight is None else "x", k)

    def split(self, x: Tensor) -> Tensor:
        """[batch, tokens, heads * head_dim] -> [batch, heads, tokens, head_dim]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `split`."""
        return x.transpose(1, 2).flatten(2)

    def make_projections(self, relative: str, bias: bool, init: str) -> None:
        inner = self.heads * self.head_dim
        for name in "qkv":
            classes = self.layout.classes if name in relative else None
            setattr(self, f"{name}_proj", projection(self.dim, inner, classes, bias, init))
        self.o_proj = nn.Linear(inner, self.dim)

    def _layout(self, x: Tensor, grid: Sizes | None) -> Layout:
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[-1] != self.dim:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x: got {got}, want (batch, tokens, dim {self.dim})")
        if not x.dtype.is_floating_point:
            raise ValueError(f"x: got {x.dtype}, want a floating point dtype")
        check_dtype("x", x, self.o_proj.weight)
        layout = self.layout
        if grid is None and len(layout.grid) == 1:
            grid = max(int(x.shape[1]) - layout.prefix, 1)
        if grid is not None:
            given = (grid,) * len(layout.grid) if isinstance(grid, int) else tuple(grid)
            # a layout is made for sizes that are numbers: tracing specialises on them here
            given = tuple(operator.index(n) if isinstance(n, int) else n for n in given)
            if given != layout.grid:
                layout = _at(layout.key, given)
        if x.shape[1] != layout.tokens:
            also = f" after {layout.prefix} prefix tokens" if layout.prefix else ""
            raise ValueError(
                f"x: got {x.shape[1]} tokens, want {layout.tokens} for the grid "
                f"{layout.input_grid}{also} (another grid is given as grid=)"
            )
        return layout

    def extra_repr(self) -> str:
        layout = self.layout
        told = [f"dim={self.dim}, grid={layout.grid}, heads={self.heads}, head_dim={self.head_dim}"]
        told += [
            f"{name}={getattr(layout, name)}"
            for name in ("causal", "window", "buckets", "prefix", "prefix_queries")
            if getattr(layout, name)
        ]
        told += [f"dilation={layout.dilation}"] if any(d > 1 for d in layout.dilation) else []
        return ", ".join(told + (["rotary=True"] if self.rotary else []))


class _Translution(Attention):
    """Attention whose query, key and value projections may depend on the offset.

    q_ij = x_i Wq[c], k_ij = x_j Wk[c], v_ij = x_j Wv[c] with c the class of the pair (on the grid,
    its offset); s_ij = q_ij · k_ij / sqrt(head_dim), y_i = Σ_j softmax_j(s_i)_j v_ij (Translution,
    section 3). No position embedding is needed beside it.

    Args:
        dim: channels of a token.
        length, grid: tokens per axis that the tables are made for; smaller inputs use a part.
        heads, head_dim: head_dim is dim / heads unless given.
        relative: which of "q", "k", "v" have tables; any subset, "" being self-attention.
        causal: (one axis) only keys at or before the query.
        window: largest offset per axis, in steps of `dilation`. None is no limit.
        dilation: only offsets that are multiples of it.
        buckets: classes on each side of 0 per axis, exact near and log-spaced far, for small
            tables and inputs of any length. None is one class per offset.
        prefix: tokens without a place, before the grid, with classes of their own.
        prefix_queries: only the prefix tokens ask (the last layer before a class token is read).
        dropout: of the attention weights.
        bias: on the query, key and value projections (one per class where they are tables).
        init: how tables start, one of `translution.modules.INITS`.
        rotary: rotary positions on q and k; only where both are shared.

    Attributes:
        layout: the `Layout`; `layout.index` is the class of each pair.
        q_proj, k_proj, v_proj: a table `.weight` [classes, dim, heads * head_dim], or nn.Linear.
        o_proj: nn.Linear with bias.

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
        window: Any = None,
        dilation: Any = 1,
        buckets: Any = None,
        prefix: int = 0,
        prefix_queries: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
        init: str = "equal",
        rotary: bool = False,
    ):
        self.relative = check_relative(relative)
        if rotary and set(relative) & set("qk"):
            raise ValueError(
                f"rotary: got True with relative={relative!r}; a table for q or k already contains "
                "every rotation by the offset, so want rotary=False, or relative 'v' or ''"
            )
        super().__init__(
            dim, grid, heads, head_dim, dropout, rotary,
            causal=causal, window=window, dilation=dilation, buckets=buckets,
            prefix=prefix, prefix_queries=prefix_queries,
        )  # fmt: skip
        self.make_projections(self.relative, bias, init)

    def score(self, query: Tensor, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        q, k = self.shared_qk(query, x, layout, cache)
        return self.primitives.scores(
            q.x, k.x, q.weight, k.weight, layout,
            heads=self.heads, bias_query=q.bias, bias_key=k.bias, scale=self.scale,
        )  # fmt: skip

    def mix(self, a: Tensor, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        v = self.v_proj(x)
        v = remember(cache, "v" if v.weight is None else "x", v)
        return self.primitives.mix(a, v.x, v.weight, layout, bias_value=v.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relative={self.relative!r}"


class Translution1d(_Translution):
    __doc__ = _Translution.__doc__
    axes = 1

    def __init__(self, dim: int, length: int, heads: int = 8, **keywords: Any):
        super().__init__(dim, length, heads, **keywords)


class Translution2d(_Translution):
    __doc__ = _Translution.__doc__
    axes = 2


class Translution3d(_Translution):
    __doc__ = _Translution.__doc__
    axes = 3


class _AlphaTranslution(Attention):
    """Ordinary attention with a relative branch of low rank (Translution, section 3.3).

    The branch first projects the tokens to heads * rank channels, then has tables from those to
    those. With q or k relative, s = (q·k + q'·k') / (2 sqrt(head_dim)); with v relative,
    y = (A v + (A ∘ v') W) / 2, W from heads * rank to heads * head_dim. A side of the branch
    that is not in `relative` is its first projection alone.

    Args:
        rank: channels per head of the branch.
        rotary: rotary positions on the ordinary branch.
        dim, grid, heads, head_dim, relative, causal, window, dilation, buckets, prefix,
            prefix_queries, dropout, bias, init: as in Translution.

    Attributes:
        q_proj, k_proj, v_proj, o_proj: those of the ordinary branch, nn.Linear.
        q_down, k_down, v_down: first projections of the branch, without bias.
        q_table, k_table, v_table: `.weight` [classes, heads * rank, heads * rank].
        v_up: from heads * rank to heads * head_dim, without bias.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """

    def __init__(
        self,
        dim: int,
        grid: Sizes,
        heads: int = 8,
        head_dim: int | None = None,
        rank: int = 8,
        relative: str = "qkv",
        causal: bool = False,
        window: Any = None,
        dilation: Any = 1,
        buckets: Any = None,
        prefix: int = 0,
        prefix_queries: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
        init: str = "equal",
        rotary: bool = False,
    ):
        self.relative = check_relative(relative)
        check_int("rank", rank, 1)
        super().__init__(
            dim, grid, heads, head_dim, dropout, rotary,
            causal=causal, window=window, dilation=dilation, buckets=buckets,
            prefix=prefix, prefix_queries=prefix_queries,
        )  # fmt: skip
        self.rank = rank
        self.relative_scores = bool(set(relative) & set("qk"))
        self.make_projections("", bias, init)
        low = heads * rank
        for name in "qkv":
            if name in relative or (name in "qk" and self.relative_scores):
                setattr(self, f"{name}_down", nn.Linear(dim, low, bias=False))
            if name in relative:
                table = projection(low, low, self.layout.classes, bias, init)
                setattr(self, f"{name}_table", table)
        if "v" in relative:
            self.v_up = nn.Linear(low, heads * self.head_dim, bias=False)

    def _branch(self, name: str, x: Tensor) -> Projected:
        low = getattr(self, f"{name}_down")(x)
        return getattr(self, f"{name}_table")(low) if name in self.relative else Projected(low)

    def score(self, query: Tensor, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        q, k = self.shared_qk(query, x, layout, cache)
        scores = self.primitives.scores
        if not self.relative_scores:
            return scores(q.x, k.x, None, None, layout, heads=self.heads, scale=self.scale)
        half = self.scale / 2
        ordinary = scores(q.x, k.x, None, None, layout, heads=self.heads, scale=half)
        q, k = self._branch("q", query), remember(cache, "low k", self._branch("k", x))
        return ordinary + scores(
            q.x, k.x, q.weight, k.weight, layout,
            heads=self.heads, bias_query=q.bias, bias_key=k.bias, scale=half,
        )  # fmt: skip

    def mix(self, a: Tensor, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        v = remember(cache, "v", self.v_proj(x))
        ordinary = self.primitives.mix(a, v.x, None, layout)
        if "v" not in self.relative:
            return ordinary
        v = remember(cache, "low v", self._branch("v", x))
        low = self.primitives.mix(a, v.x, v.weight, layout, bias_value=v.bias)
        return (ordinary + self.v_up(low)) / 2

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relative={self.relative!r}, rank={self.rank}"


class AlphaTranslution1d(_AlphaTranslution):
    __doc__ = _AlphaTranslution.__doc__
    axes = 1

    def __init__(self, dim: int, length: int, heads: int = 8, **keywords: Any):
        super().__init__(dim, length, heads, **keywords)


class AlphaTranslution2d(_AlphaTranslution):
    __doc__ = _AlphaTranslution.__doc__
    axes = 2


POSITIONS = ("none", "rotary", "bias")


class SelfAttention(Attention):
    """Ordinary self-attention, through torch's scaled_dot_product_attention.

    Args:
        dim: channels of a token.
        grid: tokens per axis; an int is one axis.
        position: "none", "rotary" (on several axes the channels are divided among them) or "bias"
            (a learned number per offset and head).
        heads, head_dim, causal, window, dilation, buckets, prefix, prefix_queries, dropout, bias:
            as in Translution.

    Attributes:
        q_proj, k_proj, v_proj, o_proj: nn.Linear.
        position_bias: `RelativeBias`, with position "bias".

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """

    def __init__(
        self,
        dim: int,
        grid: Sizes,
        heads: int = 8,
        head_dim: int | None = None,
        position: str = "none",
        causal: bool = False,
        window: Any = None,
        dilation: Any = 1,
        buckets: Any = None,
        prefix: int = 0,
        prefix_queries: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
    ):
        if position not in POSITIONS:
            raise ValueError(f"position: got {position!r}, want one of {POSITIONS}")
        super().__init__(
            dim, grid, heads, head_dim, dropout, position == "rotary",
            causal=causal, window=window, dilation=dilation, buckets=buckets,
            prefix=prefix, prefix_queries=prefix_queries,
        )  # fmt: skip
        self.position = position
        self.make_projections("", bias, "equal")
        self.position_bias: RelativeBias | None = None
        if position == "bias":
            self.position_bias = RelativeBias(self.layout.classes, self.heads)

    def attend(
        self, query: Tensor, x: Tensor, layout: Layout, mask: Tensor | None, return_weights: bool,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        q, k = self.shared_qk(query, x, layout, cache)
        v = self.split(remember(cache, "v", self.v_proj(x)).x)
        bias = self._bias(q.x, layout)
        if return_weights:
            s = offset_scores(q.x, k.x, None, None, layout, heads=self.heads, scale=self.scale)
            s = s if bias is None else s + bias
            a = masked_softmax(s, mask, layout.may_be_empty)
            y = F.dropout(a, self.dropout, self.training).to(v.dtype) @ v
            return self.join(y), a
        causal = bias is None and mask is None and layout.plain_causal
        alive = None
        if not causal and not layout.full and bias is None:
            present = torch.ops.translution.layout_index(q.x, layout.key) >= 0
            mask = present if mask is None else mask & present
        if mask is not None:
            alive = mask.any(-1, keepdim=True)
            mask = mask | ~alive  # a row that may look nowhere must not become NaN
        if bias is not None:
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        y = F.scaled_dot_product_attention(
            self.split(q.x), self.split(k.x), v, mask,
            dropout_p=self.dropout if self.training else 0.0, is_causal=causal,
        )  # fmt: skip
        return self.join(y if alive is None else y * alive), None

    def _bias(self, like: Tensor, layout: Layout) -> Tensor | None:
        if self.position_bias is None:
            return None
        index = torch.ops.translution.layout_index(like, layout.key)
        return self.position_bias(index).to(like.dtype)[None]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, position={self.position!r}"


def _at(key: str, grid: tuple[int, ...]) -> Layout:
    """Tracing takes the layout as a constant instead of following how it is made."""
    return _cached_at(key, grid)


# What torch.compiler.assume_constant_result does, without its import of the whole compiler.
_at._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=4096)
def _cached_at(key: str, grid: tuple[int, ...]) -> Layout:
    return Layout.parse(key).at(grid)


@functools.lru_cache(maxsize=64)
def _after(key: str, held: int, new: int) -> Layout:
    """That of `new` tokens against the `held` ones before them and themselves."""
    return Layout.parse(key).at(held + new).select(queries=range(held, held + new))


def check_relative(relative: str) -> str:
    """A subset of "qkv", in that order."""
    if (
        not isinstance(relative, str)
        or set(relative) - set("qkv")
        or len(set(relative)) < len(relative)
    ):
        raise ValueError(f"relative: got {relative!r}, want a subset of 'qkv' such as 'kv' or ''")
    return "".join(name for name in "qkv" if name in relative)


def _check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask: got {got}, want a boolean tensor, True = may look")
    fits = mask.ndim <= len(shape) and all(
        have in (1, want) for have, want in zip(mask.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, want one that broadcasts to (batch {shape[0]}, "
            f"heads {shape[1]}, queries {shape[2]}, keys {shape[3]})"
        )
