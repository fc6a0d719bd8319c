"""Ordinary self-attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._renamed import foreign_arguments, renamed_arguments
from ..functional import masked_softmax, single_query
from ..functional.offset_operators import layout_index
from ..layouts import Layout, OptionalSizes, Sizes
from ..operands import as_operand
from .attention import FOREIGN, Attention
from .cache import Cache, append_to_cache
from .positions import RelativeBias

__all__ = ["SelfAttention"]


@renamed_arguments(bias="qkv_bias")
@foreign_arguments(**FOREIGN, rel_pos_bias="position='bias'")
class SelfAttention(Attention):
    """Ordinary self-attention, computed by torch's scaled_dot_product_attention.

    Args:
        dim: channels of a token.
        grid: tokens per axis (1 to 3 axes); an int is one axis.
        position: "none"; "rotary", rotary positions on q and k (with several axes, the channels
            are divided among them); or "bias", a learned number per offset and head that is added
            to the score.
        heads, head_dim, causal, window, dilation, buckets, prefix, prefix_queries, dropout,
            qkv_bias, device, dtype: as in `Translution2d`.
        kv_heads: the number of key and value heads, a divisor of `heads` (grouped-query attention;
            1 is multi-query attention). Each is shared by heads / kv_heads query heads that follow
            each other, and the projections and the cache of keys and values are smaller by that
            factor. None is `heads`.

    Attributes:
        layout: the `Layout`.
        q_proj, k_proj, v_proj, o_proj: nn.Linear; k_proj and v_proj have kv_heads · head_dim
            channels.
        position_bias: `RelativeBias`, with position "bias".

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """

    position_kinds = ("none", "rotary", "bias")

    def __init__(
        self,
        dim: int,
        grid: Sizes,
        heads: int = 8,
        head_dim: int | None = None,
        position: str = "none",
        causal: bool = False,
        window: OptionalSizes = None,
        dilation: Sizes = 1,
        buckets: OptionalSizes = None,
        prefix: int = 0,
        prefix_queries: bool = False,
        dropout: float = 0.0,
        qkv_bias: bool = False,
        kv_heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            dim, grid, heads, head_dim, position=position, causal=causal, window=window,
            dilation=dilation, buckets=buckets, prefix=prefix, prefix_queries=prefix_queries,
            dropout=dropout, kv_heads=kv_heads,
        )  # fmt: skip
        self.make_projections("", qkv_bias, "equal", device, dtype)
        self.position_bias: RelativeBias | None = None
        if position == "bias":
            self.position_bias = RelativeBias(self.layout.classes, self.heads, device, dtype)

    def attend(
        self, query: Tensor, x: Tensor, layout: Layout, mask: Tensor | None, return_weights: bool,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        q, k = self.project_query_key(query, x, layout, cache)
        v = append_to_cache(cache, "v", as_operand(self.v_proj(x)))
        bias = self._bias(q.x, layout)
        if return_weights:
            k, v = self.repeat_heads(k), self.repeat_heads(v)
            s = single_query.scores(q, k, layout, heads=self.heads, scale=self.scale)
            s = s if bias is None else s + bias
            a = masked_softmax(s, mask, layout.may_be_empty)
            y = F.dropout(a, self.dropout, self.training).to(v.x.dtype) @ self.split(v.x)
            return self.join(y), a
        causal = bias is None and mask is None and layout.plain_causal
        nonempty = None
        if not causal and not layout.full and bias is None:
            present = layout_index(q.x, layout) >= 0
            mask = present if mask is None else mask & present
        if mask is not None:
            nonempty = mask.any(-1, keepdim=True)
            mask = mask | ~nonempty  # a row without any key would become NaN
        if bias is not None:
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        y = F.scaled_dot_product_attention(
            self.split(q.x), self.split(k.x), self.split(v.x), mask,
            dropout_p=self.dropout if self.training else 0.0, is_causal=causal,
            enable_gqa=self.kv_heads < self.heads,
        )  # fmt: skip
        return self.join(y if nonempty is None else y * nonempty), None

    def _bias(self, like: Tensor, layout: Layout) -> Tensor | None:
        if self.position_bias is None:
            return None
        index = layout_index(like, layout)
        return self.position_bias(index).to(like.dtype)[None]
