"""α-Translution: ordinary attention with a relative branch of low rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._renamed import foreign_arguments, renamed_arguments
from ..layouts import Layout, OptionalSizes, Sizes
from ..operands import Operand, as_operand
from .attention import FOREIGN, RENAMED, Attention, check_relative
from .cache import Cache, append_to_cache
from .checks import check_int
from .projections import projection

__all__ = ["AlphaTranslution1d", "AlphaTranslution2d"]


@renamed_arguments(**RENAMED)
@foreign_arguments(**FOREIGN, rel_pos_bias="relative, whose tables replace it")
class _AlphaTranslution(Attention):
    """Ordinary attention with a relative branch of low rank (Translution, section 3.3).

    The branch first projects the tokens to heads · rank channels, and has tables between those
    channels only. With relative queries or keys, s = (q·k + q'·k') / (2 sqrt(head_dim)), where q'
    and k' are those of the branch. With relative values, y_i = (Σ_j a_ij v_j +
    (Σ_j a_ij v'_ij) W) / 2, where W projects the mixed values v' of the branch up to
    heads · head_dim channels. Where q, k or v is not in
    `relative`, the branch uses its first projection without a table.

    Args:
        rank: channels per head of the branch.
        position: "none", or "rotary" for rotary positions on the ordinary branch.
        kv_heads: the number of key and value heads of the ordinary branch, as in `SelfAttention`.
            The relative branch has all heads.
        dim, grid, heads, head_dim, relative, causal, window, dilation, buckets, prefix,
            prefix_queries, dropout, qkv_bias, init, device, dtype: as in `Translution2d`.

    Attributes:
        q_proj, k_proj, v_proj, o_proj: the projections of the ordinary branch, nn.Linear.
        q_down, k_down, v_down: the first projections of the relative branch, without bias.
        q_table, k_table, v_table: `.weight` [classes, heads · rank, heads · rank].
        v_up: W, from heads · rank to heads · head_dim channels, without bias.

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
        check_int("rank", rank, 1)
        super().__init__(
            dim, grid, heads, head_dim, position=position, causal=causal, window=window,
            dilation=dilation, buckets=buckets, prefix=prefix, prefix_queries=prefix_queries,
            dropout=dropout, kv_heads=kv_heads,
        )  # fmt: skip
        self.rank, self.relative = rank, relative
        self.relative_scores = bool(set(relative) & set("qk"))
        self.make_projections("", qkv_bias, init, device, dtype)
        low = heads * rank
        for name in "qkv":
            if name in relative or (name in "qk" and self.relative_scores):
                down = nn.Linear(dim, low, bias=False, device=device, dtype=dtype)
                setattr(self, f"{name}_down", down)
            if name in relative:
                table = projection(low, low, self.layout.classes, qkv_bias, init, device, dtype)
                setattr(self, f"{name}_table", table)
        if "v" in relative:
            inner = heads * self.head_dim
            self.v_up = nn.Linear(low, inner, bias=False, device=device, dtype=dtype)

    def _branch(self, name: str, x: Tensor) -> Operand:
        """The operand of the relative branch for "q", "k" or "v"."""
        low = getattr(self, f"{name}_down")(x)
        return getattr(self, f"{name}_table")(low) if name in self.relative else Operand(low)

    def score(self, query: Tensor, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        q, k = self.project_query_key(query, x, layout, cache)
        k = self.repeat_heads(k)
        scores = self.primitives.scores
        if not self.relative_scores:
            return scores(q, k, layout, heads=self.heads, scale=self.scale)
        half = self.scale / 2
        ordinary = scores(q, k, layout, heads=self.heads, scale=half)
        q, k = self._branch("q", query), append_to_cache(cache, "low k", self._branch("k", x))
        return ordinary + scores(q, k, layout, heads=self.heads, scale=half)

    def mix(self, a: Tensor, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        v = append_to_cache(cache, "v", as_operand(self.v_proj(x)))
        ordinary = self.primitives.mix(a, self.repeat_heads(v), layout)
        if "v" not in self.relative:
            return ordinary
        low = append_to_cache(cache, "low v", self._branch("v", x))
        return (ordinary + self.v_up(self.primitives.mix(a, low, layout))) / 2

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relative={self.relative!r}, rank={self.rank}"


class AlphaTranslution1d(_AlphaTranslution):
    __doc__ = _AlphaTranslution.__doc__
    axes = 1


class AlphaTranslution2d(_AlphaTranslution):
    __doc__ = _AlphaTranslution.__doc__
    axes = 2
