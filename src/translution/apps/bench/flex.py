"""Neighbourhood attention by torch's flex_attention: the best other way on a GPU, to compare with.

How often a query sees a key is the product of two counts, one per axis: so a mask and a term added
to the scores, both read from two small tables, say all of it, the reflection at the borders
included, and the answer is that of `functional.neighborhood_attention` exactly. What differs is the
cost: flex_attention works on blocks of 128 queries × 128 keys of one long line of places, and
multiplies every block that has a single neighbour in it. Put row by row on that line, a block of
queries is two or three whole rows of a map, and their neighbours as many rows and six more. With
`tile` the places are put on it tile by tile, which makes the blocks fewer and costs a copy of
queries, keys, values and answer. A benchmark should try both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ...neighborhoods import Neighborhood

__all__ = ["flex_neighborhood"]


class _Plan(NamedTuple):
    """What an area is to flex_attention."""

    mask: BlockMask
    score: Callable[..., Tensor]
    query_order: Tensor
    """[queries] the query at each place of the line; `query_place` is the inverse."""
    query_place: Tensor
    key_order: Tensor


def flex_neighborhood(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    area: Neighborhood,
    scale: float | None = None,
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """Softmax attention of each query over its neighbourhood, differentiable.

    Compiled on a GPU (at the first call for an area, which takes seconds); on the CPU it runs as it
    is and holds all pairs of the map.

    Args:
        query: [batch, heads, out height, out width, head_dim].
        key, value: [batch, heads, height, width, head_dim or value channels].
        scale: of the scores; None is 1 / sqrt(head_dim).
        tile: (rows, columns) that stand together on the line of places, 8 × 16 fill a block of 128;
            None puts whole rows one after the other.

    Returns:
        [batch, heads, out height, out width, value channels].
    """
    plan = _plan(area, query.device, tile)
    q, k, v = (x.flatten(2, 3) for x in (query, key, value))
    if tile is not None:
        q = q.index_select(2, plan.query_order)
        k, v = (x.index_select(2, plan.key_order) for x in (k, v))
    call = _compiled() if query.device.type == "cuda" else flex_attention
    y = call(q, k, v, score_mod=plan.score, block_mask=plan.mask, scale=scale)
    if tile is not None:
        y = y.index_select(2, plan.query_place)
    return y.unflatten(2, area.out)


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=32)
def _plan(area: Neighborhood, device: torch.device, tile: tuple[int, int] | None) -> _Plan:
    query_order, key_order = (_order(size, tile).to(device) for size in (area.out, area.size))
    rows, columns = (_counts(area, axis).to(device) for axis in (0, 1))
    (row_logs, column_logs), (out_width, width) = (rows.log(), columns.log()), (
        area.out[1], area.size[1],
    )  # fmt: skip

    def places(q: Tensor, k: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The (query, key) indices on the rows and on the columns."""
        i, j = query_order[q], key_order[k]
        return (i // out_width, j // width), (i % out_width, j % width)

    def near(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row, column = places(q, k)
        return (rows[row] > 0) & (columns[column] > 0)

    def score(s: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row, column = places(q, k)
        return s + row_logs[row] + column_logs[column]

    mask = create_block_mask(near, None, None, len(query_order), len(key_order), device=device)
    return _Plan(mask, score, query_order, query_order.argsort(), key_order)


def _counts(area: Neighborhood, axis: int) -> Tensor:
    """[queries, places] of an axis: how often a query sees a place there."""
    seen = torch.tensor([area.neighbors(axis, query) for query in range(area.out[axis])])
    counts = torch.zeros(area.out[axis], area.size[axis])
    return counts.scatter_add_(1, seen, torch.ones(seen.shape))


def _order(size: tuple[int, int], tile: tuple[int, int] | None) -> Tensor:
    """The places of a map row by row, or tile by tile of `tile` (and row by row in a tile)."""
    high, wide = tile or (1, size[1])
    rows, columns = (torch.arange(n) for n in size)
    tiles = (rows // high)[:, None] * (size[1] // wide + 1) + (columns // wide)[None, :]
    return tiles.flatten().argsort(stable=True)
