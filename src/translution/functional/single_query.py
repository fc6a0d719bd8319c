"""The two primitives, fast for the one new query of text generation.

Where the last token is the only query and each of its keys has a class of its own
(`Layout.single_query`), the matrices that are needed are the first rows of the table, ordered from
the nearest key to the farthest. One batched matrix product then computes all pairs, and its cost is
that of reading the table once.

With buckets, many keys have one class. The query is then multiplied by the matrices of each class,
instead of the keys: q^c · (x_j Wk[c]) = (Wk[c] q^c) · x_j. In the same way the values are mixed
before they are projected: Σ_c (Σ_j∈c a_j x_j) Wv[c]. All other layouts go to `functional.offset`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layouts import Layout
from ..operands import Operand
from . import offset
from .offset import autocast
from .offset_operators import HALF, layout_index

__all__ = ["mix", "scores"]


def scores(
    query: Operand, key: Operand, layout: Layout, *, heads: int, scale: float = 1.0
) -> Tensor:
    """The scores of all pairs, [batch, heads, queries, keys], as `functional.offset.scores`."""
    if _shares_classes(layout) and (_has_table(query) or _has_table(key)):
        return _shared_scores(query, key, layout, heads) * scale
    if layout.single_query is None or not (_has_table(query) or _has_table(key)):
        return offset.scores(query, key, layout, heads=heads, scale=scale)
    count = layout.single_query[0]
    x_key = _nearest_first(autocast(key.x), layout, 1)
    q = _projected(query._replace(x=autocast(query.x).transpose(0, 1)), count)
    k = _projected(key._replace(x=x_key.transpose(0, 1)), count)  # [keys, batch, inner]
    if q.dtype in HALF:
        q, k = q.float(), k.float()
    near = (q * k).unflatten(-1, (heads, -1)).sum(-1).permute(1, 2, 0) * scale
    s = near.new_full((*near.shape[:2], 1, layout.n_keys), float("-inf"))
    s[:, :, 0, _seen_keys(layout)] = near.flip(-1)
    return s


def mix(a: Tensor, value: Operand, layout: Layout) -> Tensor:
    """The mixed values, [batch, queries, heads · head_dim], as `functional.offset.mix`."""
    if _shares_classes(layout) and _has_table(value):
        return _shared_mix(a, value, layout)
    if layout.single_query is None or not _has_table(value):
        return offset.mix(a, value, layout)
    x = autocast(value.x)
    rows = value._replace(x=_nearest_first(x, layout, 1).transpose(0, 1))
    v = _projected(rows, layout.single_query[0]).unflatten(-1, (a.shape[1], -1))
    near = _nearest_first(a, layout, 3)[:, :, 0].permute(2, 0, 1)  # [keys, batch, heads]
    return (v.to(near.dtype) * near[..., None]).sum(0).flatten(1)[:, None].to(x.dtype)


def _shares_classes(layout: Layout) -> bool:
    """Whether the last token of a text is the only query, and several keys may have one class."""
    whole = layout.causal and not layout.prefix and layout.keys is None and layout.shard is None
    last = layout.queries == (layout.tokens - 1,)
    return whole and last and layout.single_query is None and layout.buckets is not None


def _seen_classes(layout: Layout) -> int:
    """How many classes have a key: they are the first ones of the table."""
    most = (layout.tokens - 1) // layout.dilation[0]
    if layout.window is not None and layout.window[0] is not None:
        most = min(most, layout.window[0])
    return 1 + sum(start <= most for start in layout.bucket_starts(0))


def _shared_scores(query: Operand, key: Operand, layout: Layout, heads: int) -> Tensor:
    x = autocast(key.x)
    count = _seen_classes(layout)
    q = _projected(query._replace(x=autocast(query.x).transpose(0, 1)), count)
    if q.dtype in HALF:
        q, x = q.float(), x.float()
    q = q.expand(count, -1, -1).unflatten(-1, (heads, -1))  # [classes, batch, heads, D]
    if key.weight is None:
        by_class = torch.einsum("kbhd,bnhd->kbhn", q, x.unflatten(-1, (heads, -1)))
    else:
        matrices = key.weight[:count].to(x.dtype).unflatten(-1, (heads, -1))
        by_class = torch.einsum("kbhd,kchd->kbhc", q, matrices) @ x.mT
        if key.bias is not None:
            bias = key.bias[:count].to(x.dtype).unflatten(-1, (heads, -1))
            by_class = by_class + torch.einsum("kbhd,khd->kbh", q, bias)[..., None]
    index = layout_index(x, layout)
    s = by_class.gather(0, index.clamp(min=0).expand(1, *by_class.shape[1:]))[0]
    return s.masked_fill(index < 0, float("-inf"))[:, :, None]


def _shared_mix(a: Tensor, value: Operand, layout: Layout) -> Tensor:
    assert value.weight is not None
    x = autocast(value.x)
    count = _seen_classes(layout)
    classes = torch.arange(count, device=x.device)[:, None]
    elsewhere = layout_index(x, layout) != classes
    weights = a.masked_fill(elsewhere, 0.0)  # [batch, heads, classes, keys]
    mixed = weights.flatten(1, 2).to(x.dtype) @ x
    mixed = mixed.unflatten(1, (a.shape[1], -1))
    matrices = value.weight[:count].to(x.dtype).unflatten(-1, (a.shape[1], -1))
    y = torch.einsum("bhkc,kchd->bhd", mixed, matrices)
    if value.bias is not None:
        bias = value.bias[:count].to(x.dtype).unflatten(-1, (a.shape[1], -1))
        y = y + torch.einsum("bhk,khd->bhd", weights.sum(-1).to(x.dtype), bias)
    return y.flatten(1)[:, None]


def _has_table(operand: Operand) -> bool:
    return operand.weight is not None and operand.weight.ndim == 3


def _seen_keys(layout: Layout) -> slice:
    """The positions of the keys that the query sees, from the farthest to the nearest."""
    assert layout.single_query is not None
    count, step = layout.single_query
    return slice(layout.n_keys - 1 - (count - 1) * step, None, step)


def _nearest_first(x: Tensor, layout: Layout, dim: int) -> Tensor:
    """The seen keys along `dim`, in the order of their classes: the query's own token first."""
    return x[(slice(None),) * dim + (_seen_keys(layout),)].flip(dim)


def _projected(operand: Operand, count: int) -> Tensor:
    """Multiply row i of the tokens [rows, batch, channels] by the table's matrix i, i < count.

    The result is [count, batch, heads · head_dim]; a single row is multiplied by every matrix. With
    no table, it is x.
    """
    x, weight, bias = operand
    if weight is None:
        return x
    x = torch.matmul(x, weight[:count].to(x.dtype))
    return x if bias is None else x + bias[:count, None].to(x.dtype)
