"""What all attention over tokens has in common.

`Attention` is the skeleton of self-attention, Translution and α-Translution: it checks the input,
finds its `Layout`, and applies scores, softmax, mix and output projection in that order. The three
differ in which projections are tables, and so in `score` and `mix`.
"""

from __future__ import annotations

import functools
import math
import operator
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import masked_softmax, single_query
from ..layouts import Layout, OptionalSizes, Sizes
from ..operands import Operand, as_operand
from .cache import Cache, append_to_cache
from .checks import check_dtype, check_int
from .positions import apply_rotary, check_rotary, rotary_angles
from .projections import projection, repeat_heads

__all__ = [
    "FOREIGN",
    "RENAMED",
    "Attention",
    "Primitives",
    "check_relative",
    "position_of",
]


class Primitives:
    """The functions that a layer with tables calls for scores, softmax and mix.

    `translution.interop.parallel` and eight-bit layers put their own in their place.
    `SelfAttention` has no tables, and calls torch's scaled_dot_product_attention instead.
    """

    scores = staticmethod(single_query.scores)
    softmax = staticmethod(masked_softmax)
    mix = staticmethod(single_query.mix)

    @staticmethod
    def weights(a: Tensor) -> Tensor:
        """The attention weights of all pairs, from the result of `softmax`."""
        return a


def position_of(rotary: bool, given: Any = None) -> dict[str, str]:
    """The arguments that replace the earlier `rotary`."""
    return {"position": "rotary" if rotary else "none"}


RENAMED: dict[str, Any] = {"length": "grid", "bias": "qkv_bias", "rotary": position_of}
"""Earlier argument names of the classes made from `Attention`."""

FOREIGN = {
    "embed_dim": "dim",
    "num_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "kernel_size": "window, which is (kernel_size - 1) / 2: the steps to one side",
    "is_causal": "causal",
    "attn_drop": "dropout",
}
"""Names that NATTEN, timm and transformers have for arguments of these classes."""


class Attention(nn.Module):
    """The skeleton of attention over tokens. Subclasses define `score` and `mix`, or `attend`.

    Args:
        dim, grid, heads, head_dim, kv_heads, position, dropout: as in `translution.Translution2d`.
        causal, window, dilation, buckets, prefix, prefix_queries: as in `translution.Layout`.
    """

    axes: int | None = None
    """The number of axes of the grid; None allows 1 to 3."""
    position_kinds: tuple[str, ...] = ("none", "rotary")
    """The values that `position` may have."""
    primitives: Any = Primitives()
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def __init__(
        self,
        dim: int,
        grid: Sizes,
        heads: int,
        head_dim: int | None,
        *,
        position: str,
        causal: bool,
        window: OptionalSizes,
        dilation: Sizes,
        buckets: OptionalSizes,
        prefix: int,
        prefix_queries: bool,
        dropout: float,
        kv_heads: int | None = None,
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
        kv_heads = heads if kv_heads is None else kv_heads
        check_int("kv_heads", kv_heads, 1)
        if heads % kv_heads:
            raise ValueError(f"kv_heads: got {kv_heads}, want a divisor of heads {heads}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: got {dropout}, want at least 0 and less than 1")
        if position not in self.position_kinds:
            raise ValueError(f"position: got {position!r}, want one of {self.position_kinds}")
        if self.axes is not None and isinstance(grid, int):
            grid = (grid,) * self.axes
        self.layout = Layout(
            cast(Any, grid), causal, cast(Any, window), cast(Any, dilation), cast(Any, buckets),
            prefix, prefix_queries,
        )  # fmt: skip
        if self.axes is not None and len(self.layout.grid) != self.axes:
            raise ValueError(f"grid: got {grid}, want {self.axes} sizes (or one int for all)")
        if position == "rotary":
            check_rotary(head_dim, len(self.layout.grid))
        self.dim, self.heads, self.head_dim, self.kv_heads = dim, heads, head_dim, kv_heads
        self.position, self.dropout = position, dropout
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
            x: [batch, prefix + tokens, dim]: the prefix tokens first, then the grid, row-major.
            grid: tokens per axis of this input. The default is the length of the input on one
                axis, and on several axes the grid that the layer was made for.
            mask: boolean, True where the query sees the key, broadcastable to
                [batch, heads, queries, keys]. A query that sees no key yields zeros before the
                output projection.
            return_weights: also return the attention weights.
            cache: the result of `make_cache`. `x` then holds only the tokens that follow those of
                earlier calls; they see the cached tokens and each other, and are appended to the
                cache. It requires `torch.no_grad()`. The keys of a mask are then the `held` tokens
                of the cache, followed by those of `x`.

        Returns:
            [batch, queries, dim]. The queries are all tokens, or with `prefix_queries` the prefix
            tokens only. With `return_weights` also the weights [batch, heads, queries, keys]; with
            a cache, the keys are the cached tokens followed by those of `x`.

        Raises:
            ValueError: naming the argument, what came and what is wanted.
        """
        layout = self._layout(x, grid)
        if cache is not None and cache.length:
            layout = _continued_layout(layout.spec, cache.held, int(x.shape[1]))
        if mask is not None:
            _check_mask(mask, (x.shape[0], self.heads, layout.n_queries, layout.n_keys))
            mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        query = x[:, : layout.prefix] if layout.prefix_queries else x
        y, weights = self.attend(query, x, layout, mask, return_weights, cache)
        if cache is not None:
            cache.advance(x.shape[1])
        y = self.o_proj(y)
        return (y, cast(Tensor, weights)) if return_weights else y

    def make_cache(self) -> Cache:
        """An empty key and value cache for this layer.

        Raises:
            ValueError: the layer is not causal, or has prefix tokens.
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
        """Scores, softmax and mix: the mixed tokens [batch, queries, heads · head_dim], and the
        weights [batch, heads, queries, keys] or None."""
        s = self.score(query, x, layout, cache)
        a = self.primitives.softmax(s, mask, layout.may_be_empty)
        y = self.mix(F.dropout(a, self.dropout, self.training), x, layout, cache)
        return y, self.primitives.weights(a) if return_weights else None

    def score(self, query: Tensor, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """The scores [batch, heads, queries, keys] of the tokens `query` and `x`."""
        raise NotImplementedError

    def mix(self, a: Tensor, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """The values of `x` summed with the weights `a`: [batch, queries, heads · head_dim]."""
        raise NotImplementedError

    def project_query_key(
        self, query: Tensor, x: Tensor, layout: Layout, cache: Cache | None = None
    ) -> tuple[Operand, Operand]:
        """Query and key of the tokens, with rotary positions applied; cached keys come first."""
        q, k = as_operand(self.q_proj(query)), as_operand(self.k_proj(x))
        if self.position == "rotary":  # before caching, so that a key is rotated only once
            k_heads = self.split(k.x)
            angles = rotary_angles(k_heads, layout, 0 if cache is None else cache.dropped)
            q = Operand(self.join(apply_rotary(self.split(q.x), *angles)))
            k = Operand(self.join(apply_rotary(k_heads, *angles)))
        return q, append_to_cache(cache, "k" if k.weight is None else "x", k)

    def split(self, x: Tensor) -> Tensor:
        """[batch, tokens, heads · head_dim] -> [batch, heads, tokens, head_dim].

        Keys and values have `kv_heads` heads.
        """
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `split`."""
        return x.transpose(1, 2).flatten(2)

    def repeat_heads(self, side: Operand) -> Operand:
        """Keys or values with as many heads as the queries have."""
        return repeat_heads(side, self.heads, self.head_dim)

    def make_projections(
        self, relative: str, qkv_bias: bool, init: str, device: Any, dtype: torch.dtype | None
    ) -> None:
        """Make q_proj, k_proj, v_proj (tables for those in `relative`) and o_proj.

        Raises:
            ValueError: a table of keys or values, with fewer of their heads.
        """
        if self.kv_heads < self.heads and set(relative) & set("kv"):
            raise ValueError(
                f"kv_heads: got {self.kv_heads} with relative={relative!r}, but a table of keys or "
                f"values has all {self.heads} heads; want None, or relative 'q' or ''"
            )
        for name in "qkv":
            heads = self.heads if name == "q" else self.kv_heads
            classes = self.layout.classes if name in relative else None
            made = projection(
                self.dim, heads * self.head_dim, classes, qkv_bias, init, device, dtype
            )
            setattr(self, f"{name}_proj", made)
        inner = self.heads * self.head_dim
        self.o_proj = nn.Linear(inner, self.dim, device=device, dtype=dtype)

    def _layout(self, x: Tensor, grid: Sizes | None) -> Layout:
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[-1] != self.dim:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x: got {got}, want (batch, tokens, dim {self.dim})")
        if not x.dtype.is_floating_point:
            raise ValueError(f"x: got {x.dtype}, want a floating point dtype")
        check_dtype("x", x, self.o_proj)
        layout = self.layout
        if grid is None and len(layout.grid) == 1:
            grid = max(int(x.shape[1]) - layout.prefix, 1)
        if grid is not None:
            given = (grid,) * len(layout.grid) if isinstance(grid, int) else tuple(grid)
            # A layout needs sizes that are numbers, so tracing specialises on them here.
            given = tuple(operator.index(n) if isinstance(n, int) else n for n in given)
            if given != layout.grid:
                layout = _layout_at(layout.spec, given)
        if x.shape[1] != layout.tokens:
            also = f" after {layout.prefix} prefix tokens" if layout.prefix else ""
            raise ValueError(
                f"x: got {x.shape[1]} tokens, want {layout.tokens} for the grid "
                f"{layout.input_grid}{also} (another grid is given as grid=)"
            )
        return layout

    def extra_repr(self) -> str:
        layout = self.layout
        shown = [f"dim={self.dim}, grid={layout.grid}, heads={self.heads}"]
        shown += [f"head_dim={self.head_dim}"]
        shown += [f"kv_heads={self.kv_heads}"] if self.kv_heads < self.heads else []
        shown += [
            f"{name}={getattr(layout, name)}"
            for name in ("causal", "window", "buckets", "prefix", "prefix_queries")
            if getattr(layout, name)
        ]
        shown += [f"dilation={layout.dilation}"] if any(d > 1 for d in layout.dilation) else []
        shown += [f"position={self.position!r}"] if self.position != "none" else []
        return ", ".join(shown)


def _layout_at(spec: str, grid: tuple[int, ...]) -> Layout:
    """The layout on another grid. Tracing takes it as a constant and does not look inside."""
    return _cached_layout_at(spec, grid)


# torch.compiler.assume_constant_result sets this, but would import all of torch's compiler.
_layout_at._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=4096)
def _cached_layout_at(spec: str, grid: tuple[int, ...]) -> Layout:
    return Layout.parse(spec).at(grid)


@functools.lru_cache(maxsize=64)
def _continued_layout(spec: str, cached: int, new: int) -> Layout:
    """The layout of `new` tokens as queries, and of them and the `cached` ones before as keys."""
    return Layout.parse(spec).at(cached + new).select(queries=range(cached, cached + new))


def check_relative(relative: str) -> str:
    """A subset of the letters of "qkv", in that order.

    Raises:
        ValueError: another letter, or one that occurs twice.
    """
    if (
        not isinstance(relative, str)
        or set(relative) - set("qkv")
        or len(set(relative)) < len(relative)
    ):
        raise ValueError(f"relative: got {relative!r}, want a subset of 'qkv' such as 'kv' or ''")
    return "".join(name for name in "qkv" if name in relative)


def _check_mask(mask: Tensor, shape: Sequence[int]) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask: got {got}, want a boolean tensor, True where a query sees a key")
    fits = mask.ndim <= len(shape) and all(
        have in (1, want) for have, want in zip(mask.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, want one that broadcasts to (batch {shape[0]}, "
            f"heads {shape[1]}, queries {shape[2]}, keys {shape[3]})"
        )


def __getattr__(name: str) -> Any:
    """The earlier place of `SelfAttention`, which is imported from here, and not the reverse."""
    if name != "SelfAttention":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .self_attention import SelfAttention

    warnings.warn(
        f"{__name__}.SelfAttention is now translution.SelfAttention", DeprecationWarning, 2
    )
    return SelfAttention
