"""Neighbourhood attention in plain torch, forward and backward.

The plain way copies every key and value once per query that sees it, k² times, and then works on
single rows. Here the queries are divided into small tiles. The few keys that a tile sees are
gathered once, so that scores, softmax and mix of a tile are three small matrix products; a term
added to the scores says which keys of the tile are neighbours of which query, and how often. What
is thrown away (the keys of a tile that a query does not see) costs less than the copies would: see
docs/performance.md. The backward pass computes the scores again instead of keeping them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...neighborhoods import Neighborhood
from .offset import wide

__all__ = ["as_map", "neighborhood_attention", "neighborhood_attention_backward", "places", "room"]

NUMBERS = {"cpu": 300_000, "cuda": 30_000_000}
"""Numbers of a kind held at once, by device: on the CPU what its caches hold."""


def places(x: Tensor) -> Tensor:
    """[batch, heads, height, width, channels] -> [batch, places, heads, channels], contiguous."""
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2).contiguous()


def as_map(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """The inverse of `places`, as a view: channels last in memory, which suits convolutions."""
    return x.unflatten(1, size).permute(0, 3, 1, 2, 4)


def room(like: Tensor, channels: int) -> Tensor:
    """Memory for the places of a map like this one: [batch, places, heads, channels]."""
    batch, heads, height, width, _ = like.shape
    return like.new_empty(batch, height * width, heads, channels)


def neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, area: Neighborhood, scale: float
) -> Tensor:
    """Softmax attention of each query over its neighbourhood.

    Args:
        query: [batch, heads, out height, out width, head_dim].
        key, value: [batch, heads, height, width, head_dim or value channels].

    Returns:
        [batch, heads, out height, out width, value channels].
    """
    walk = _Walk(query, key, area)
    y = room(query, value.shape[4])
    q, k, v = places(query), places(key), places(value)
    for chunk in walk.chunks:
        picked_q = walk.queries(q[chunk]).mul_(scale)
        picked_k, picked_v = walk.keys(k[chunk]), walk.keys(v[chunk])
        for head in range(walk.heads):
            weights = walk.softmax(picked_q[:, :, head], picked_k[:, :, head])
            walk.to_queries(torch.bmm(weights, picked_v[:, :, head]), y[chunk, :, head])
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
    """The gradients of query, key and value from that of y, what `neighborhood_attention` gave."""
    walk = _Walk(query, key, area)
    gq, gk, gv = (room(x, x.shape[4]) for x in (query, key, value))
    up, q, k, v = places(grad), places(query), places(key), places(value)
    # Σ_j of softmax's backward, a_ij dy_i · v_j, is dy_i · y_i
    along = (up.to(walk.wide) * places(y)).sum(-1, keepdim=True)
    for chunk in walk.chunks:
        dy, dot = walk.queries(up[chunk]), walk.queries(along[chunk])
        picked_q = walk.queries(q[chunk]).mul_(scale)
        picked_k, picked_v = walk.keys(k[chunk]), walk.keys(v[chunk])
        for head in range(walk.heads):
            head_q, head_k, head_v = (x[:, :, head] for x in (picked_q, picked_k, picked_v))
            weights = walk.softmax(head_q, head_k)
            walk.to_keys(weights, dy[:, :, head], gv[chunk, :, head])
            ds = torch.bmm(dy[:, :, head], head_v.transpose(1, 2))
            ds = ds.sub_(dot[:, :, head]).mul_(weights)
            walk.to_queries(torch.bmm(ds, head_k).mul_(scale), gq[chunk, :, head])
            walk.to_keys(ds, head_q, gk[chunk, :, head])
    return as_map(gq, area.out), as_map(gk, area.size), as_map(gv, area.size)


class _Walk:
    """The samples in chunks, and the gathers and sums of one head of a chunk.

    Maps are [samples, places, heads, channels]: what is gathered holds all heads, and the matrix
    products take one head of it where it lies.
    """

    def __init__(self, query: Tensor, key: Tensor, area: Neighborhood):
        self.wide = wide(query.dtype)
        self.tiles = tiles = area.tiles(query.device, self.wide)
        self.places, self.heads = key.shape[2] * key.shape[3], query.shape[1]
        numbers = NUMBERS.get(query.device.type, NUMBERS["cuda"])
        # the scores of a head, or what is gathered of all heads, whichever is more
        gathered = tiles.count * tiles.keys * self.heads * key.shape[4]
        step = min(query.shape[0], max(1, numbers // max(1, tiles.log_times.numel(), gathered)))
        self.chunks = [
            slice(i, min(i + step, query.shape[0])) for i in range(0, query.shape[0], step or 1)
        ]
        self.log_times = tiles.log_times.repeat(step, 1, 1) if step > 1 else tiles.log_times
        size = tiles.count * tiles.keys
        first = torch.arange(step, device=query.device)[:, None] * size
        # a row of zeros comes before those of the tiles, for places that fewer tiles hold
        slots = torch.where(tiles.key_slots == size, 0, 1 + first + tiles.key_slots)
        self.slots = slots.view(step, self.places, tiles.copies).transpose(1, 2).contiguous()

    def queries(self, x: Tensor) -> Tensor:
        """[samples, places, heads, channels] -> [samples * tiles, queries, heads, channels]."""
        picked = x.index_select(1, self.tiles.query_index).to(self.wide)
        if self.tiles.used is not None:  # an unused place must add nothing to any gradient
            picked *= self.tiles.used[:, None]
        return picked.view(-1, self.tiles.queries, *x.shape[2:])

    def keys(self, x: Tensor) -> Tensor:
        picked = x.index_select(1, self.tiles.key_index).to(self.wide)
        return picked.view(-1, self.tiles.keys, *x.shape[2:])

    def softmax(self, query: Tensor, key: Tensor) -> Tensor:
        """[samples * tiles, queries, keys]: each key's share, all its reflections together."""
        s = torch.bmm(query, key.transpose(1, 2))
        return torch.softmax(s.add_(self.log_times[: len(s)]), -1)

    def to_queries(self, x: Tensor, out: Tensor) -> None:
        """Tiles back to the queries of the map, out [samples, places, channels]."""
        flat = x.view(len(out), -1, x.shape[-1])
        out.copy_(flat.index_select(1, self.tiles.query_slot))

    def to_keys(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Sum leftᵀ right of every tile into the places of the map: gathered, so without races."""
        t, channels = self.tiles, right.shape[-1]
        held = right.new_empty(1 + len(out) * t.count * t.keys, channels)
        held[0] = 0
        torch.bmm(left.transpose(1, 2), right, out=held[1:].view(-1, t.keys, channels))
        picked = held.index_select(0, self.slots[: len(out)].reshape(-1))
        picked = picked.view(len(out), t.copies, self.places, channels)
        out.copy_(picked.sum(1) if t.copies > 1 else picked[:, 0])
