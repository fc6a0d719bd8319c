"""Attention over k×k neighbourhoods in plain torch, forward and backward.

    s_ij = scale · q_i · k_j        a_i = softmax_j(s_i)        y_i = Σ_j a_ij v_j

for j over the neighbours of query i. With dy as the gradient of y, the gradients are

    dv_j = Σ_i a_ij dy_i            ds_ij = a_ij (dy_i · v_j - dy_i · y_i)
    dq_i = scale · Σ_j ds_ij k_j    dk_j  = scale · Σ_i ds_ij q_i

The plain way copies the k² neighbours of every query and multiplies them by single rows. Here the
queries are divided into small tiles (`Neighborhood.tiles`). The few keys that the queries of a tile
have as neighbours are gathered once, and scores, softmax and sum of a tile are three small matrix
products. Logarithms of counts, added to the scores, say which keys are neighbours of which query
and how often: log 0 = -inf removes a pair from the softmax. The scores of pairs that are not
neighbours are computed in vain, which costs less than the copies would: see docs/performance.md.
The backward pass computes the scores again instead of storing them.

Shapes are written with

    B batch   H heads   N queries   M keys   D head_dim   C value channels
    T tiles (of all samples of a chunk)      n queries of a tile      m keys of a tile

N and M are positions of the maps in row-major order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...neighborhoods import Neighborhood
from .offset import sum_dtype

__all__ = [
    "as_map",
    "empty_positions",
    "flatten_positions",
    "neighborhood_attention",
    "neighborhood_attention_backward",
]

ELEMENTS = {"cpu": 300_000, "cuda": 30_000_000}
"""How many scores, or gathered numbers, exist at a time, by kind of device. On a CPU this many stay
in its cache."""


def flatten_positions(x: Tensor) -> Tensor:
    """[B, H, height, width, channels] -> [B, height · width, H, channels], contiguous."""
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2).contiguous()


def as_map(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """The inverse of `flatten_positions`, as a view.

    Its memory is channels-last, the format in which convolutions are fast.
    """
    return x.unflatten(1, size).permute(0, 3, 1, 2, 4)


def empty_positions(like: Tensor, channels: int) -> Tensor:
    """Uninitialised memory [B, height · width, H, channels] for a map of the size of `like`."""
    batch, heads, height, width, _ = like.shape
    return like.new_empty(batch, height * width, heads, channels)


def neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, area: Neighborhood, scale: float
) -> Tensor:
    """Softmax attention of each query over its neighbourhood.

    Args:
        query: [B, H, out height, out width, D].
        key: [B, H, height, width, D].
        value: [B, H, height, width, C].
        area: the neighbourhood of each query.
        scale: the factor on the scores.

    Returns:
        [B, H, out height, out width, C].
    """
    tiled = _Tiled(query, key, area)
    y = empty_positions(query, value.shape[4])  # [B, N, H, C]
    q, k, v = flatten_positions(query), flatten_positions(key), flatten_positions(value)
    for chunk in tiled.chunks:
        tile_q = tiled.gather_queries(q[chunk]).mul_(scale)  # [T, n, H, D]
        tile_k, tile_v = tiled.gather_keys(k[chunk]), tiled.gather_keys(v[chunk])  # [T, m, H, .]
        for head in range(tiled.heads):
            weights = tiled.softmax(tile_q[:, :, head], tile_k[:, :, head])  # [T, n, m]
            tiled.write_queries(torch.bmm(weights, tile_v[:, :, head]), y[chunk, :, head])
    return as_map(y, area.out)


def neighborhood_attention_backward(
    grad: Tensor,
    y: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    area: Neighborhood,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value.

    Args:
        grad: the gradient of y.
        y: what `neighborhood_attention` returned.
        query, key, value, area, scale: its arguments.
    """
    tiled = _Tiled(query, key, area)
    dq, dk, dv = (empty_positions(x, x.shape[4]) for x in (query, key, value))
    up, q, k, v = (flatten_positions(x) for x in (grad, query, key, value))
    dots = (up.to(tiled.sum_dtype) * flatten_positions(y)).sum(-1, keepdim=True)  # dy_i · y_i
    for chunk in tiled.chunks:
        tile_dy, dot = tiled.gather_queries(up[chunk]), tiled.gather_queries(dots[chunk])
        tile_q = tiled.gather_queries(q[chunk]).mul_(scale)
        tile_k, tile_v = tiled.gather_keys(k[chunk]), tiled.gather_keys(v[chunk])
        for head in range(tiled.heads):
            head_dy, head_dot = tile_dy[:, :, head], dot[:, :, head]
            head_q, head_k, head_v = (x[:, :, head] for x in (tile_q, tile_k, tile_v))
            weights = tiled.softmax(head_q, head_k)  # [T, n, m]
            tiled.sum_over_queries(weights, head_dy, dv[chunk, :, head])
            ds = torch.bmm(head_dy, head_v.transpose(1, 2))
            ds = ds.sub_(head_dot).mul_(weights)
            tiled.write_queries(torch.bmm(ds, head_k).mul_(scale), dq[chunk, :, head])
            tiled.sum_over_queries(ds, head_q, dk[chunk, :, head])  # head_q contains the scale
    return as_map(dq, area.out), as_map(dk, area.size), as_map(dv, area.size)


class _Tiled:
    """The tiles of one call: which samples are computed at a time, and how tiles are read and
    written.

    Tokens are gathered for all heads at once, [T, n or m, H, channels]. The matrix products of a
    head read its slice of that in place.

    Attributes:
        chunks: slices of the batch. The samples of a slice are computed at the same time.
        heads: H.
        sum_dtype: the dtype of scores and sums.
    """

    def __init__(self, query: Tensor, key: Tensor, area: Neighborhood):
        self.sum_dtype = sum_dtype(query.dtype)
        self.tiles = tiles = area.tiles(query.device, self.sum_dtype)
        self.positions, self.heads = key.shape[2] * key.shape[3], query.shape[1]
        elements = ELEMENTS.get(query.device.type, ELEMENTS["cuda"])
        # A chunk is as many samples as make up the elements, counted in the scores of one head or
        # in the gathered keys of all heads, whichever are more.
        gathered = tiles.count * tiles.keys * self.heads * key.shape[4]
        step = min(query.shape[0], max(1, elements // max(1, tiles.log_times.numel(), gathered)))
        self.chunks = [
            slice(i, min(i + step, query.shape[0])) for i in range(0, query.shape[0], step or 1)
        ]
        self.log_times = tiles.log_times.repeat(step, 1, 1) if step > 1 else tiles.log_times
        # `sum_over_queries` puts a row of zeros before the rows of the tiles. It is row 0, and
        # positions that are in fewer tiles than others read it.
        size = tiles.count * tiles.keys
        first = torch.arange(step, device=query.device)[:, None] * size
        slots = torch.where(tiles.key_slots == size, 0, 1 + first + tiles.key_slots)
        # [samples, copies, M]
        self.slots = slots.view(step, self.positions, tiles.copies).transpose(1, 2).contiguous()

    def gather_queries(self, x: Tensor) -> Tensor:
        """[samples, N, H, channels] -> [T, n, H, channels]."""
        rows = x.index_select(1, self.tiles.query_index).to(self.sum_dtype)
        if self.tiles.used is not None:  # queries that only fill up must add to no gradient
            rows *= self.tiles.used[:, None]
        return rows.view(-1, self.tiles.queries, *x.shape[2:])

    def gather_keys(self, x: Tensor) -> Tensor:
        """[samples, M, H, channels] -> [T, m, H, channels]."""
        rows = x.index_select(1, self.tiles.key_index).to(self.sum_dtype)
        return rows.view(-1, self.tiles.keys, *x.shape[2:])

    def softmax(self, query: Tensor, key: Tensor) -> Tensor:
        """The attention weights [T, n, m] of queries [T, n, D] and keys [T, m, D].

        The weight of a key contains all its reflections.
        """
        s = torch.bmm(query, key.transpose(1, 2))
        return torch.softmax(s.add_(self.log_times[: len(s)]), -1)

    def write_queries(self, x: Tensor, out: Tensor) -> None:
        """Copy tiles [T, n, channels] back to the map, `out` [samples, N, channels]."""
        flat = x.view(len(out), -1, x.shape[-1])
        out.copy_(flat.index_select(1, self.tiles.query_slot))

    def sum_over_queries(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Write Σ leftᵀ right over all queries to the map of keys, `out` [samples, M, channels].

        A key is in several tiles. The plain way adds the rows of each tile to the map (scatter), in
        an order that differs from run to run on a GPU. Here each position of the map gathers its
        rows from the tiles and sums them, always in the same order.

        Args:
            left: [T, n, m].
            right: [T, n, channels].
            out: [samples, M, channels].
        """
        t, channels = self.tiles, right.shape[-1]
        rows = right.new_empty(1 + len(out) * t.count * t.keys, channels)
        rows[0] = 0
        torch.bmm(left.transpose(1, 2), right, out=rows[1:].view(-1, t.keys, channels))
        gathered = rows.index_select(0, self.slots[: len(out)].reshape(-1))
        gathered = gathered.view(len(out), t.copies, self.positions, channels)
        out.copy_(gathered.sum(1) if t.copies > 1 else gathered[:, 0])
