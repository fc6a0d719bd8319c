"""The k×k neighbours of each position of a map: the geometry of local operators on images.

`layouts` does the same for tokens on a grid. No other module computes where a neighbourhood is at a
border, under a stride or under a dilation. Where a neighbourhood reaches over the border, the map
is continued by reflection.

Positions are numbered in row-major order. A position is a *key*, and also a *query* where the
stride puts one. Queries and keys are the two sides of the pairs (query, neighbour).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .caches import cached
from .layouts import Sizes

__all__ = ["Blocks", "Neighborhood", "Tiles", "pair", "reflect"]

"""One int for both axes, or (rows, columns)."""

TILE = 7
"""The number of queries along a side of a tile. Their keys are a square with sides of
TILE + kernel - 1. Smaller tiles compute fewer scores of pairs that are not neighbours, and larger
ones gather fewer keys twice. 7 was the fastest on a CPU with kernels of 7: see
docs/performance.md."""


def pair(name: str, value: Sizes, least: int = 1) -> tuple[int, int]:
    """Return (rows, columns) for an int or two of them.

    Raises:
        ValueError: `value` is not that, or an int is below `least`. The message contains `name`.
    """
    both = tuple(value) if isinstance(value, Sequence) else (value, value)
    ints = len(both) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in both)
    if not ints or min(both) < least:
        raise ValueError(f"{name}: got {value!r}, want an int of at least {least}, or two of them")
    return both  # type: ignore[return-value]


def reflect(position: int, size: int) -> int:
    """Return the position on a line of `size` that a position outside of it is reflected to.

    The line is reflected at both ends as often as needed. The ends themselves are not repeated.
    """
    if size == 1:
        return 0
    position %= 2 * (size - 1)
    return min(position, 2 * (size - 1) - position)


@dataclass(frozen=True)
class Neighborhood:
    """The k×k neighbourhood of each query on a map.

    Query (y, x) is at position (y, x) · stride of the map. Its neighbours are at the positions
    (y, x) · stride + dilation · t, for t from -(k - 1) / 2 to (k - 1) / 2 on both axes. Positions
    outside of the map are reflected at its borders, on small maps several times. A query may
    therefore have the same neighbour several times.

    Attributes:
        size: (height, width) of the map of keys.
        kernel: (rows, columns) of the neighbourhood, odd.
        stride: (rows, columns) from one query to the next.
        dilation: (rows, columns) from one neighbour to the next.
        out: (height, width) of the map of queries, size / stride rounded up.
    """

    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    @staticmethod
    def of(size: Sizes, kernel_size: Sizes, stride: Sizes = 1, dilation: Sizes = 1) -> Neighborhood:
        """Make a Neighborhood from ints or pairs of ints.

        Raises:
            ValueError: naming the argument, what came and what is wanted.
        """
        kernel = pair("kernel_size", kernel_size)
        if not all(k % 2 for k in kernel):
            raise ValueError(f"kernel_size: got {kernel_size!r}, want odd sizes")
        return Neighborhood(
            pair("size", size), kernel, pair("stride", stride), pair("dilation", dilation)
        )

    @property
    def out(self) -> tuple[int, int]:
        (height, width), (down, right) = self.size, self.stride
        return (height - 1) // down + 1, (width - 1) // right + 1

    @property
    def taps(self) -> int:
        """The number of neighbours of a query."""
        return self.kernel[0] * self.kernel[1]

    def neighbors(self, axis: int, query: int) -> list[int]:
        """The positions of a query's neighbours along one axis, one per tap of the kernel."""
        reach = (self.kernel[axis] - 1) // 2
        center = query * self.stride[axis]
        return [
            reflect(center + self.dilation[axis] * t, self.size[axis])
            for t in range(-reach, reach + 1)
        ]

    def line(self, axis: int) -> list[int]:
        """The positions of one axis, continued by reflection as far as neighbours reach."""
        reach = self.dilation[axis] * (self.kernel[axis] - 1) // 2
        size = self.size[axis]
        return [reflect(position, size) for position in range(-reach, size + reach)]

    @property
    def index(self) -> Tensor:
        """The position of the key of each query at each tap, int64 [queries, taps]."""
        rows, columns = (
            torch.tensor([self.neighbors(axis, query) for query in range(self.out[axis])])
            for axis in (0, 1)
        )
        width = self.size[1]
        index = rows[:, None, :, None] * width + columns[None, :, None, :]
        return index.reshape(self.out[0] * self.out[1], self.taps)

    def partners(self, axis: int, side: str) -> tuple[list[list[int]], int]:
        """The pairs along one axis, by query ("queries") or by key ("keys").

        Returns:
            The positions of the other side that each position of `side` has pairs with, one entry
            per pair; and the distance between the closest positions of `side` that have partners in
            common. (With a dilation of 2, for example, even and odd positions have none.)
        """
        dilation = self.dilation[axis]
        keys_of = [self.neighbors(axis, query) for query in range(self.out[axis])]
        if side == "queries":
            return keys_of, dilation // math.gcd(self.stride[axis], dilation)
        queries_of: list[list[int]] = [[] for _ in range(self.size[axis])]
        for query, keys in enumerate(keys_of):
            for key in keys:
                queries_of[key].append(query)
        return queries_of, dilation

    def tiles(self, device: torch.device, dtype: torch.dtype) -> Tiles:
        """The queries divided into tiles. They are cached: do not write to them.

        Args:
            device: where the tables are wanted.
            dtype: the dtype of the scores.
        """
        return _tiles(self, device, dtype)

    def blocks(self, side: str, rows: int, step: int) -> Blocks:
        """One side of the pairs, "queries" or "keys", divided into tiles of at most `rows`.

        A kernel multiplies each tile by its positions of the other side, `step` of them at a time.
        Among the shapes that a tile can have, this takes the one with the fewest multiplications.
        It is computed on the CPU, anew at each call.

        Args:
            side: "queries" or "keys".
            rows: the number of positions of a tile, a power of two.
            step: the number of positions of the other side that are multiplied at a time.
        """
        return _blocks(self, side, rows, step)


@dataclass(frozen=True)
class Tiles:
    """A division of the queries into tiles of equal size, each with the keys of all its queries.

    A tile contains each key once. If a query has that key as a neighbour n times (by reflection),
    log n is added to its score, which is exact: exp(s + log n) = n · exp(s). If the key is not its
    neighbour at all, log 0 = -inf removes the pair from the softmax.

    Attributes:
        count: the number of tiles.
        queries: the number of queries of a tile.
        keys: the number of keys of a tile.
        query_index: int64 [count · queries], positions of the queries. A tile with fewer queries is
            filled up by repeating one.
        key_index: int64 [count · keys], positions of the keys. A tile with fewer keys is filled up
            by repeating one of its own.
        used: [count · queries, 1], 0 where `query_index` only fills up and 1 elsewhere; None if it
            fills up nowhere.
        log_times: [count, queries, keys], the logarithm of how often the key is a neighbour of the
            query.
        query_slot: int64 [queries of the map], the inverse of `query_index`: where each query is in
            the tiles.
        key_slots: int64 [positions of the map · copies], the inverse of `key_index`: where each
            position is in the tiles; count · keys where it is in fewer tiles than `copies`.
        copies: the largest number of tiles that contain the same key.
    """

    count: int
    queries: int
    keys: int
    query_index: Tensor
    key_index: Tensor
    used: Tensor | None
    log_times: Tensor
    query_slot: Tensor
    key_slots: Tensor
    copies: int


@dataclass(frozen=True)
class Blocks:
    """A division of one side of the pairs into tiles of equal size, each with its partners.

    Attributes:
        rows: [tiles, rows], positions of this side; -1 where a tile has fewer.
        others: [tiles, others], the positions of the other side that a tile has pairs with, each
            once. A tile with fewer is filled up by repeating one of its own.
        times: [tiles, rows, others], how often the key of the pair is a neighbour of its query: 0
            where it is not, and more than 1 where reflection makes it so.
    """

    rows: Tensor
    others: Tensor
    times: Tensor


@dataclass(frozen=True)
class _Line:
    """The tiles along one axis. Both axes together make the tiles of a map.

    Names are those of tiles of queries; for tiles of keys the two sides are exchanged.

    Attributes:
        queries: [tiles, queries], -1 where a tile has fewer.
        keys: [tiles, keys], filled up by repeating one.
        times: [tiles, queries, keys], how often the query has the key as a neighbour.
        slots_of: for each key, the (tile, slot) pairs where it is in `keys`.
    """

    queries: Tensor
    keys: Tensor
    times: Tensor
    slots_of: list[list[tuple[int, int]]]


def _line(area: Neighborhood, axis: int, tile: int, side: str = "queries") -> _Line:
    """Divide one axis into tiles of at most `tile` queries.

    With a dilation, queries next to each other have no key in common. So a tile takes queries that
    are as far apart as those that do have keys in common (`Neighborhood.partners`).
    """
    keys_of, apart = area.partners(axis, side)
    tiles: list[list[int]] = []
    for first in range(min(apart, len(keys_of))):
        group = list(range(first, len(keys_of), apart))
        each = math.ceil(len(group) / math.ceil(len(group) / tile))  # tiles of about equal size
        tiles += [group[i : i + each] for i in range(0, len(group), each)]
    keys_by_query = [[keys_of[query] for query in queries] for queries in tiles]
    # With a stride, a tile of keys may have no query at all. It gets the first one, zero times.
    keys_by_tile = [
        sorted({key for keys in queries for key in keys}) or [0] for queries in keys_by_query
    ]
    most_queries, most_keys = max(map(len, tiles)), max(map(len, keys_by_tile))
    query_table = torch.full((len(tiles), most_queries), -1)
    # A tile is filled up with a key of its own, so that a NaN elsewhere on the map stays there.
    key_table = torch.tensor([keys[:1] for keys in keys_by_tile]).repeat(1, most_keys)
    times = torch.zeros(len(tiles), most_queries, most_keys)
    across = area.size[axis] if side == "queries" else area.out[axis]
    slots_of: list[list[tuple[int, int]]] = [[] for _ in range(across)]
    for i, (queries, keys) in enumerate(zip(tiles, keys_by_tile, strict=True)):
        query_table[i, : len(queries)] = torch.tensor(queries)
        key_table[i, : len(keys)] = torch.tensor(keys)
        slot = {key: j for j, key in enumerate(keys)}
        for key in keys:
            slots_of[key].append((i, slot[key]))
        for row, neighbors in enumerate(keys_by_query[i]):
            for key in neighbors:
                times[i, row, slot[key]] += 1
        # A row that only fills up gets one key, since a softmax over no keys would be NaN.
        times[i, len(queries) :, 0] = 1
    return _Line(query_table, key_table, times, slots_of)


def _combine(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Combine the tables of both axes, [tiles, slots] each, to row-major positions.

    Args:
        rows: [tiles down, slots down].
        columns: [tiles right, slots right].
        width: the width of the map.

    Returns:
        [tiles down · tiles right, slots down · slots right].
    """
    both = rows[:, None, :, None] * width + columns[None, :, None, :]
    return both.reshape(len(rows) * len(columns), -1)


def _blocks(area: Neighborhood, side: str, rows: int, step: int) -> Blocks:
    """See `Neighborhood.blocks`."""
    shapes = [(high, rows // high) for high in (1 << n for n in range(rows.bit_length()))]

    def lines(shape: tuple[int, int]) -> tuple[_Line, _Line]:
        return _line(area, 0, shape[0], side), _line(area, 1, shape[1], side)

    def cost(lines: tuple[_Line, _Line]) -> tuple[int, int]:
        """Multiplications of whole steps; then those of single positions, if these are equal."""
        tiles, others = (math.prod(line.keys.shape[axis] for line in lines) for axis in (0, 1))
        return tiles * math.ceil(others / step), tiles * others

    down, right = min(map(lines, shapes), key=cost)
    own, other = (area.out, area.size) if side == "queries" else (area.size, area.out)
    index = _combine(down.queries.clamp(min=0), right.queries.clamp(min=0), own[1])
    unused = _combine((down.queries < 0).long(), (right.queries < 0).long(), 1) > 0
    times = down.times[:, None, :, None, :, None] * right.times[None, :, None, :, None, :]
    return Blocks(
        rows=index.masked_fill(unused, -1),
        others=_combine(down.keys, right.keys, other[1]),
        times=times.reshape(*index.shape, -1),
    )


@cached
def _tiles(area: Neighborhood, device: torch.device, dtype: torch.dtype) -> Tiles:
    """See `Neighborhood.tiles`."""
    # On large maps flatter tiles are faster. A small map is covered by few tiles, and square ones
    # then need fewer keys around them.
    tall = TILE if min(area.out) <= 2 * TILE else (TILE + 1) // 2
    down, right = _line(area, 0, tall), _line(area, 1, TILE)
    (ny, ty), (nx, tx), my, mx = (
        down.queries.shape, right.queries.shape, down.keys.shape[1], right.keys.shape[1],
    )  # fmt: skip
    width = area.out[1]
    query_index = _combine(down.queries.clamp(min=0), right.queries.clamp(min=0), width).flatten()
    unused = _combine((down.queries < 0).long(), (right.queries < 0).long(), 1).flatten() > 0
    query_slot = torch.empty(area.out[0] * area.out[1], dtype=torch.int64)
    query_slot[query_index[~unused]] = (~unused).nonzero().flatten()
    times = down.times[:, None, :, None, :, None] * right.times[None, :, None, :, None, :]
    # A position of the map is in each tile whose rows contain its row and whose columns contain
    # its column.
    tiles_down, slots_down = _slot_tables(down.slots_of)
    tiles_right, slots_right = _slot_tables(right.slots_of)
    absent = (tiles_down < 0)[:, None, :, None] | (tiles_right < 0)[None, :, None, :]
    tile = tiles_down[:, None, :, None] * nx + tiles_right[None, :, None, :]
    slot = slots_down[:, None, :, None] * mx + slots_right[None, :, None, :]
    count, keys = ny * nx, my * mx
    key_slots = (tile * keys + slot).masked_fill(absent, count * keys)
    return Tiles(
        count=count,
        queries=ty * tx,
        keys=keys,
        query_index=query_index.to(device),
        key_index=_combine(down.keys, right.keys, area.size[1]).flatten().to(device),
        used=(~unused)[:, None].to(device, dtype) if bool(unused.any()) else None,
        log_times=times.reshape(count, ty * tx, keys).to(dtype).log().to(device),
        query_slot=query_slot.to(device),
        key_slots=key_slots.reshape(-1).to(device),
        copies=tiles_down.shape[1] * tiles_right.shape[1],
    )


def _slot_tables(slots_of: list[list[tuple[int, int]]]) -> tuple[Tensor, Tensor]:
    """The (tile, slot) pairs of each position as two tables.

    Returns:
        The tiles and the slots, each [positions, most pairs of a position]; -1 where a position has
        fewer.
    """
    most = max(1, *map(len, slots_of))
    table = torch.full((len(slots_of), most, 2), -1)
    for position, pairs in enumerate(slots_of):
        for i, (tile, slot) in enumerate(pairs):
            table[position, i, 0], table[position, i, 1] = tile, slot
    return table[..., 0], table[..., 1]
