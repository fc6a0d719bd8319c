"""Neighbourhood attention computed by torch's flex_attention, for comparisons on a GPU.

The number of times that a query sees a key is the product of two counts, one for each axis. A count
exceeds 1 where the border reflects. A mask and a term that is added to the scores, both read from
two small tables of counts, therefore describe the neighbourhood exactly, and the result equals that
of `functional.neighborhood_attention`.

The cost is different. flex_attention puts all pixels into one sequence, cuts it into blocks of 128
queries × 128 keys, and computes each block that contains at least one neighbour. If the pixels are
in row order, a block of queries covers two or three rows of a map, and its neighbours cover six
rows more. With `tile` the pixels are ordered tile by tile, which needs fewer blocks, but a copy of
queries, keys, values and output. A benchmark should measure both.
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
    """The form in which flex_attention needs a neighbourhood.

    Attributes:
        mask: the pairs of queries and keys that are neighbours.
        score: adds the logarithm of the counts to the scores.
        query_order: int64 [queries], the query at each place of the sequence.
        query_place: int64 [queries], the place of each query in the sequence.
        key_order: int64 [keys], the key at each place of the sequence.
    """

    mask: BlockMask
    score: Callable[..., Tensor]
    query_order: Tensor
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
    """Compute the softmax attention of each query over its neighbourhood; it is differentiable.

    On a GPU it is compiled; the first call for each neighbourhood takes seconds. On a CPU it is not
    compiled, and holds the scores of all pairs of pixels.

    Args:
        query: the queries [batch, heads, out height, out width, head_dim].
        key: the keys [batch, heads, height, width, head_dim].
        value: the values [batch, heads, height, width, value channels].
        area: the neighbours of each query.
        scale: the factor of the scores; None takes 1 / sqrt(head_dim).
        tile: the (rows, columns) of the tiles in which the pixels are ordered, such as (8, 16),
            which fills a block of 128; None orders the pixels row by row.

    Returns:
        The output [batch, heads, out height, out width, value channels].
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
        """Return the (query, key) row indices and the (query, key) column indices."""
        i, j = query_order[q], key_order[k]
        return (i // out_width, j // width), (i % out_width, j % width)

    def near(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Return whether a query sees a key."""
        row, column = places(q, k)
        return (rows[row] > 0) & (columns[column] > 0)

    def score(s: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Add the logarithm of the number of times that a query sees a key."""
        row, column = places(q, k)
        return s + row_logs[row] + column_logs[column]

    mask = create_block_mask(near, None, None, len(query_order), len(key_order), device=device)
    return _Plan(mask, score, query_order, query_order.argsort(), key_order)


def _counts(area: Neighborhood, axis: int) -> Tensor:
    """Return how often each query sees each place along an axis, float32 [queries, places]."""
    seen = torch.tensor([area.neighbors(axis, query) for query in range(area.out[axis])])
    counts = torch.zeros(area.out[axis], area.size[axis])
    return counts.scatter_add_(1, seen, torch.ones(seen.shape))


def _order(size: tuple[int, int], tile: tuple[int, int] | None) -> Tensor:
    """Return the order of the pixels of a map: row by row, or tile by tile.

    Within a tile the order is row by row.
    """
    high, wide = tile or (1, size[1])
    rows, columns = (torch.arange(n) for n in size)
    tiles = (rows // high)[:, None] * (size[1] // wide + 1) + (columns // wide)[None, :]
    return tiles.flatten().argsort(stable=True)
