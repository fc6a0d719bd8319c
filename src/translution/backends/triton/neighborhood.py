"""Attention over k×k neighbourhoods in Triton: index tables, block sizes and launches.

The kernels (`neighborhood_kernels`) take one tile per program. In the forward pass and for the
gradient of the queries the tiles are tiles of queries; for the gradients of keys and values they
are tiles of keys. `Neighborhood.blocks` computes, for each tile, which positions of the other side
it has pairs with. Reflection at the borders, strides and dilations are all contained in these
tables. They are computed once per neighbourhood and device. A forward pass is then one launch and
a backward pass two; none of them waits for the GPU or copies anything to it, and the only memory
besides the results is two numbers per query and head. The plain way stores every key k² times. The
plain torch backend, which writes partial sums per tile, moves them through memory in float32 about
three times.
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
    """The configuration of a kernel.

    Attributes:
        rows: positions of a tile.
        others: positions of the other side that are multiplied at a time.
        warps, stages: Triton's `num_warps` and `num_stages`.
    """

    rows: int
    others: int
    warps: int
    stages: int


def block_sizes(width: int, dtype: torch.dtype, even: bool = True) -> BlockSizes:
    """The configuration for heads of a width.

    On an H100 none of them spills registers if the width is a power of two;
    tests/core/test_triton_compiled.py compiles the kernels to check it.

    Args:
        width: head_dim or value channels, whichever is larger, padded to a power of two.
        dtype: of the tokens.
        even: whether neither of the two needed padding.
    """
    if interpreted():  # small, so that small maps have several tiles and blocks
        return BlockSizes(32, 16, 4, 1)
    half = dtype in (torch.bfloat16, torch.float16)
    if width <= 128 and half:  # four warps multiply 64 rows at a time
        return BlockSizes(64, 32, 4, 3) if even or width <= 64 else BlockSizes(64, 32, 8, 2)
    if width <= 128:
        return BlockSizes(64, 16, 8, 2)
    if width <= 256 and half:
        return BlockSizes(32, 32, 8, 2)
    return BlockSizes(16, 16, 8, 2)


class Tables(NamedTuple):
    """`neighborhoods.Blocks` on a device, padded to the block sizes of a kernel.

    Attributes:
        rows: int32 [tiles, block rows], positions; -1 for padding.
        others: int32 [tiles, blocks · block others], positions; padding repeats one of the tile.
        counts: int8 or int32 [tiles, block rows, blocks · block others], how often the key of the
            pair is a neighbour of its query; 0 where it is not.
    """

    rows: Tensor
    others: Tensor
    counts: Tensor


@cached
def tables(area: Neighborhood, device: torch.device, side: str, rows: int, others: int) -> Tables:
    """The tables for tiles of `rows` positions of a side, "queries" or "keys".

    They are computed on the CPU. For a large map they take about 10 MB.
    """
    made = area.blocks(side, rows, others)
    tiles, high, across = made.times.shape
    extra = -across % others
    counts = made.times.new_zeros(tiles, rows, across + extra)
    counts[:, :high, :across] = made.times
    row_index = made.rows.new_full((tiles, rows), -1)
    row_index[:, :high] = made.rows
    other_index = torch.cat([made.others, made.others[:, :1].expand(-1, extra)], 1)
    # The dtype depends on the kernel size and not on the largest count, since a kernel is compiled
    # per dtype, and all maps should share it.
    dtype = torch.int8 if area.taps < 128 else torch.int32
    return Tables(
        row_index.int().to(device), other_index.int().to(device), counts.to(device, dtype)
    )


class _Launch:
    """What the kernels of one call have in common: inputs, sizes and constants.

    Attributes:
        query, key, value: [batch, positions, heads, channels].
        batch, heads, queries, keys: their sizes.
        dim, channels: head_dim, and the channels of a value.
        block: the configuration of the kernels.
        constants: their compile-time arguments.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, area: Neighborhood):
        self.area = area
        self.query, self.key, self.value = map(flatten_positions, (query, key, value))
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
        """Launch a kernel on the tiles of a side.

        Args:
            name: the kernel.
            side: "queries" or "keys".
            tensors: its first arguments. The tables and the sizes, which are those of all kernels,
                follow them.
            numbers: its last arguments, after the sizes.
        """
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
        key: [batch, heads, height, width, head_dim].
        value: [batch, heads, height, width, value channels].
        area: the neighbourhood of each query.
        scale: the factor on the scores.

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
    """The gradients of query, key and value.

    Args:
        grad: the gradient of y.
        y: what `neighborhood_attention` returned.
        query, key, value, area, scale: its arguments.
    """
    call = _Launch(query, key, value, area)
    dy, q, k, v = flatten_positions(grad), call.query, call.key, call.value
    dq, dk, dv = (empty_positions(x, x.shape[4]) for x in (query, key, value))
    shape = (call.batch, call.heads, call.queries)
    # Two tensors and not two halves of one: the second half might begin at an address that is not a
    # multiple of 16 bytes, for which Triton would compile the kernels once more.
    logs, dots = (query.new_empty(shape, dtype=sum_dtype(query.dtype)) for _ in range(2))
    numbers = scale * LOG2E, scale
    tensors = (q, k, v, flatten_positions(y), dy, dq, logs, dots)
    call("attend_to_queries", "queries", tensors, numbers)
    call("attend_to_keys", "keys", (q, k, v, dy, dk, dv, logs, dots), numbers)
    return as_map(dq, area.out), as_map(dk, area.size), as_map(dv, area.size)
