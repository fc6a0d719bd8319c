"""The two primitives for one new query, when each of its keys has a class of its own.

A table's rows are then one slice (`Layout.row`), nearest first, and all matrices are multiplied in
one call: reading the table once is all that it costs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layouts import Layout
from .offset import HALF, autocast, offset_mix, offset_scores

__all__ = ["row_mix", "row_scores"]


def row_scores(
    x_query: Tensor,
    x_key: Tensor,
    w_query: Tensor | None,
    w_key: Tensor | None,
    layout: Layout,
    *,
    heads: int,
    bias_query: Tensor | None = None,
    bias_key: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """As `offset_scores`, with tables or None; any layout, quick where it has a `row`."""
    if layout.row is None or (w_query is None and w_key is None):
        more: dict[str, Any] = {"bias_query": bias_query, "bias_key": bias_key, "scale": scale}
        return offset_scores(x_query, x_key, w_query, w_key, layout, heads=heads, **more)
    x_query, x_key = autocast(x_query), autocast(x_key)
    count = layout.row[0]
    q = _project(x_query.transpose(0, 1), w_query, bias_query, count)
    k = _project(_nearest_first(x_key, layout, 1).transpose(0, 1), w_key, bias_key, count)
    if q.dtype in HALF:
        q, k = q.float(), k.float()
    near = (q * k).unflatten(-1, (heads, -1)).sum(-1).permute(1, 2, 0) * scale
    s = near.new_full((*near.shape[:2], 1, layout.n_keys), float("-inf"))
    s[:, :, 0, _places(layout)] = near.flip(-1)
    return s


def row_mix(
    a: Tensor,
    x_value: Tensor,
    w_value: Tensor | None,
    layout: Layout,
    *,
    bias_value: Tensor | None = None,
) -> Tensor:
    """As `offset_mix`, with a table or None; any layout, quick where it has a `row`."""
    if layout.row is None or w_value is None:
        return offset_mix(a, x_value, w_value, layout, bias_value=bias_value)
    x_value = autocast(x_value)
    rows = _nearest_first(x_value, layout, 1).transpose(0, 1)
    v = _project(rows, w_value, bias_value, layout.row[0]).unflatten(-1, (a.shape[1], -1))
    near = _nearest_first(a, layout, 3)[:, :, 0].permute(2, 0, 1)  # [keys, batch, heads]
    return (v.to(near.dtype) * near[..., None]).sum(0).flatten(1)[:, None].to(x_value.dtype)


def _places(layout: Layout) -> slice:
    """The keys that are there, in their order."""
    assert layout.row is not None
    count, step = layout.row
    return slice(layout.n_keys - 1 - (count - 1) * step, None, step)


def _nearest_first(x: Tensor, layout: Layout, dim: int) -> Tensor:
    """Those keys along `dim`, the query's own first."""
    return x[(slice(None),) * dim + (_places(layout),)].flip(dim)


def _project(x: Tensor, weight: Tensor | None, bias: Tensor | None, count: int) -> Tensor:
    """[count or 1, batch, channels] by the table's first `count` matrices, one for each row."""
    if weight is None:
        return x
    x = torch.matmul(x, weight[:count].to(x.dtype))
    return x if bias is None else x + bias[:count, None].to(x.dtype)
