"""Neighbourhood attention in Triton: tables, block sizes and launches.

What is clever is which tiles there are: those of the queries going forward and for the gradient of
the queries, those of the keys for the gradients of keys and values, each with the places of the
other side that it has pairs with (`Neighborhood.blocks`). Reflection at the borders, strides and
dilations are all in these tables, which are made once for an area and a device, so that a call is
one launch (going back, two): nothing waits for the GPU, nothing is copied to it, and no memory is
taken but the answers and, going back, two numbers per query and head. The plain way holds every
key k² times; partial sums per tile, which the plain torch backend gathers, would be written and
read in float32 some three times over.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...caches import cached
from ...neighborhoods import Neighborhood
from ..torch.neighborhood import as_map, empty_positions, flatten_positions
from ..torch.offset import sum_dtype
from .blocks import power
from .support import arithmetic, interpreted, launch

__all__ = ["neighborhood_attention", "neighborhood_attention_backward"]

LOG2E = math.log2(math.e)


class BlockSizes(NamedTuple):
    """The sizes of a kernel's blocks, and with how many warps and stages it is compiled."""

    rows: int
    others: int
    warps: int
    stages: int


def block_sizes(width: int, dtype: torch.dtype, even: bool = True) -> BlockSizes:
    """For channels padded to `width`, which they fill or not (`even`); such that on an H100 no
    register is spilled where they do: `tests/core/test_neighborhood.py` compiles the kernels and
    looks.
    """
    if interpreted():  # small maps still have several tiles and blocks
        return BlockSizes(32, 16, 4, 1)
    half = dtype in (torch.bfloat16, torch.float16)
    if width <= 128 and half:  # 64 rows are what four warps multiply at once
        return BlockSizes(64, 32, 4, 3) if even or width <= 64 else BlockSizes(64, 32, 8, 2)
    if width <= 128:
        return BlockSizes(64, 16, 8, 2)
    if width <= 256 and half:
        return BlockSizes(32, 32, 8, 2)
    return BlockSizes(16, 16, 8, 2)


class Tables(NamedTuple):
    """`neighborhoods.Blocks` on a device, padded to the block sizes of a kernel."""

    rows: Tensor
    """int32 [tiles, block rows], -1 for none."""
    others: Tensor
    """int32 [tiles, blocks * block others]; padding repeats a place of the tile."""
    times: Tensor
    """int8 or int32 [tiles, block rows, blocks * block others], 0 for no pair."""


@cached
def tables(area: Neighborhood, device: torch.device, side: str, rows: int, others: int) -> Tables:
    """Made on the host, once; a large map has some 10 MB."""
    made = area.blocks(side, rows, others)
    tiles, high, across = made.times.shape
    extra = -across % others
    padded = made.times.new_zeros(tiles, rows, across + extra)
    padded[:, :high, :across] = made.times
    row_index = made.rows.new_full((tiles, rows), -1)
    row_index[:, :high] = made.rows
    other_index = torch.cat([made.others, made.others[:, :1].expand(-1, extra)], 1)
    # by the kernel's size, not by the largest number, so that maps share what is compiled
    small = torch.int8 if area.taps < 128 else torch.int32
    return Tables(
        row_index.int().to(device), other_index.int().to(device), padded.to(device, small)
    )


class _Launch:
    """What the kernels of one call have in common."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, area: Neighborhood):
        self.area = area
        self.query, self.key, self.value = (
            flatten_positions(query),
            flatten_positions(key),
            flatten_positions(value),
        )
        self.batch, self.keys, self.heads, self.dim = self.key.shape
        self.queries, self.channels = self.query.shape[1], self.value.shape[3]
        padded = [power(n, 16) for n in (self.dim, self.channels)]
        even = padded == [self.dim, self.channels]
        self.block = block_sizes(max(padded), query.dtype, even)
        self.constants: dict[str, Any] = {
            "DIM": padded[0],
            "CHANNELS": padded[1],
            "EVEN_DIM": padded[0] == self.dim,
            "EVEN_CHANNELS": padded[1] == self.channels,
            **arithmetic(query.dtype),
        }

    def __call__(
        self, name: str, side: str, tensors: tuple[Tensor, ...], numbers: tuple[float, ...]
    ) -> None:
        """Run the kernel of this name on the tiles of a side, from its first arguments and its
        last: the tables and sizes stand between."""
        from . import neighborhood_kernels

        block = self.block
        table = tables(self.area, self.query.device, side, block.rows, block.others)
        tiles, blocks = len(table.rows), table.others.shape[1] // block.others
        launch(
            getattr(neighborhood_kernels, name), (self.batch * self.heads * tiles,),
            *tensors, *table,
            self.queries, self.keys, self.heads, tiles, blocks, self.dim, self.channels,
            *numbers, **self.constants, ROWS=block.rows, OTHERS=block.others,
            num_warps=block.warps, num_stages=block.stages,
        )  # fmt: skip


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
    call = _Launch(query, key, value, area)
    y = empty_positions(query, call.channels)
    tensors = call.query, call.key, call.value, y
    call("attend", "queries", tensors, (scale * LOG2E,))
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
    call = _Launch(query, key, value, area)
    up, q, k, v = flatten_positions(grad), call.query, call.key, call.value
    gq, gk, gv = (empty_positions(x, x.shape[4]) for x in (query, key, value))
    shape = (call.batch, call.heads, call.queries)
    # two of them: a half of one would begin where nothing is aligned, and be compiled for
    logs, along = (query.new_empty(shape, dtype=sum_dtype(query.dtype)) for _ in range(2))
    numbers = scale * LOG2E, scale
    call(
        "attend_to_queries",
        "queries",
        (q, k, v, flatten_positions(y), up, gq, logs, along),
        numbers,
    )
    call("attend_to_keys", "keys", (q, k, v, up, gk, gv, logs, along), numbers)
    return as_map(gq, area.out), as_map(gk, area.size), as_map(gv, area.size)
