"""Which places of a map are the neighbours of which: the geometry of local operators on images.

As `layouts` is for tokens on a grid: nothing else knows how a neighbourhood lies at a border, under
a stride or a dilation. Where it reaches over the border, the map is continued by reflection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .caches import cached

__all__ = ["Blocks", "Neighborhood", "Sizes", "Tiles", "pair", "reflect"]

Sizes = int | Sequence[int]

TILE = 7
"""Queries along a side of a tile. Their keys lie in a square of TILE + kernel - 1, so small tiles
multiply less that is thrown away, and large ones copy fewer keys twice. Measured on the CPU with
kernels of 7: see docs/performance.md."""


def pair(name: str, value: Sizes, least: int = 1) -> tuple[int, int]:
    """(rows, columns) of an int or two of them."""
    both = tuple(value) if isinstance(value, Sequence) else (value, value)
    fine = len(both) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in both)
    if not fine or min(both) < least:
        raise ValueError(f"{name}: got {value!r}, want an int of at least {least}, or two of them")
    return both  # type: ignore[return-value]


def reflect(place: int, size: int) -> int:
    """The place inside a line of `size` that a place outside stands for, mirrored at both ends
    (the ends are not repeated) as often as it takes."""
    if size == 1:
        return 0
    place %= 2 * (size - 1)
    return min(place, 2 * (size - 1) - place)


@dataclass(frozen=True)
class Neighborhood:
    """The k×k neighbourhood of each query on a map.

    Query (y, x) stands at the place (y, x) · stride of the map; its neighbours are at
    (place + dilation · t) for t from -(k - 1) / 2 to (k - 1) / 2 on both axes, reflected at the
    borders. Small maps may be reflected more than once.

    Attributes:
        size: (height, width) of the map of keys.
        kernel: (rows, columns), odd.
        stride, dilation: per axis.
        out: (height, width) of the queries, size / stride rounded up.
    """

    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    @staticmethod
    def of(size: Sizes, kernel_size: Sizes, stride: Sizes = 1, dilation: Sizes = 1) -> Neighborhood:
        """Checked, from ints or pairs."""
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
        return self.kernel[0] * self.kernel[1]

    def neighbors(self, axis: int, query: int) -> list[int]:
        """The places on one axis that a query sees there, tap by tap."""
        reach = (self.kernel[axis] - 1) // 2
        centre = query * self.stride[axis]
        return [
            reflect(centre + self.dilation[axis] * t, self.size[axis])
            for t in range(-reach, reach + 1)
        ]

    def line(self, axis: int) -> list[int]:
        """The places of one axis, continued on both sides as far as neighbours reach."""
        reach = self.dilation[axis] * (self.kernel[axis] - 1) // 2
        size = self.size[axis]
        return [reflect(place, size) for place in range(-reach, size + reach)]

    @property
    def index(self) -> Tensor:
        """int64 [queries, taps]: which place of the map (row-major) each query sees at each tap."""
        rows, columns = (
            torch.tensor([self.neighbors(axis, query) for query in range(self.out[axis])])
            for axis in (0, 1)
        )
        width = self.size[1]
        index = rows[:, None, :, None] * width + columns[None, :, None, :]
        return index.reshape(self.out[0] * self.out[1], self.taps)

    def seen_from(self, axis: int, side: str) -> tuple[list[list[int]], int]:
        """Of each query ("queries") the places that it sees on one axis, or of each place ("keys")
        the queries that see it there, as often as they do; and how far apart queries (or places)
        are that have some of them in common."""
        spread = self.dilation[axis]
        seen = [self.neighbors(axis, query) for query in range(self.out[axis])]
        if side == "queries":
            return seen, spread // math.gcd(self.stride[axis], spread)
        seers: list[list[int]] = [[] for _ in range(self.size[axis])]
        for query, places in enumerate(seen):
            for place in places:
                seers[place].append(query)
        return seers, spread

    def tiles(self, device: torch.device, dtype: torch.dtype) -> Tiles:
        """The queries in tiles, cached; dtype is that of the scores."""
        return _tiles(self, device, dtype)

    def blocks(self, side: str, rows: int, step: int) -> Blocks:
        """The "queries", or the "keys", in tiles of at most `rows`, a power of two.

        Of the shapes that a tile can have, the one is taken in which the fewest pairs are
        multiplied when the other side comes `step` places at a time. It is computed anew at each
        call, on the CPU.
        """
        return _blocks(self, side, rows, step)


@dataclass(frozen=True)
class Tiles:
    """A division of the queries into equal tiles, each with the few keys that its queries see.

    Each key of a tile is there once. A query that sees it several times (by reflection) has the
    logarithm of that number added to its score, which is exact: exp(s + log n) = n exp(s).

    Attributes:
        count, queries, keys: of the tiles, of the queries in one, of the keys in one.
        query_index: [count * queries] places among the queries; unused places repeat a query.
        key_index: [count * keys] places of the map; unused places repeat one.
        used: [count * queries, 1], 0 where a place is unused; None if all are used.
        log_times: [count, queries, keys] the logarithm of how often a query sees a key.
        query_slot: [queries of the map] where in the tiles a query is.
        key_slots: [places of the map * copies] where in the tiles a place of the map is as a key;
            count * keys where it is in fewer tiles than others.
        copies: the most tiles that hold a place as a key.
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
    """One side of the pairs, the queries or the keys, in equal tiles; each tile with the places of
    the other side that it has pairs with, all there once.

    Attributes:
        rows: [tiles, rows] the places of this side, -1 where a tile has fewer.
        others: [tiles, others] places of the other side; where there are fewer, one is repeated.
        times: [tiles, rows, others] how often the query of the pair sees its key (by reflection it
            may be several times), 0 where it does not.
    """

    rows: Tensor
    others: Tensor
    times: Tensor


@dataclass(frozen=True)
class _Line:
    """The tiles along one axis: [tiles, queries], [tiles, keys], times [tiles, queries, keys] and
    for each place the (tile, slot) pairs that hold it as a key. (Or with the sides exchanged.)"""

    queries: Tensor
    keys: Tensor
    times: Tensor
    holders: list[list[tuple[int, int]]]


def _line(area: Neighborhood, axis: int, tile: int, side: str = "queries") -> _Line:
    """Queries of one tile have the same place modulo the dilation, so that they share keys."""
    all_seen, apart = area.seen_from(axis, side)
    tiles: list[list[int]] = []
    for first in range(min(apart, len(all_seen))):
        alike = list(range(first, len(all_seen), apart))
        each = math.ceil(len(alike) / math.ceil(len(alike) / tile))
        tiles += [alike[i : i + each] for i in range(0, len(alike), each)]
    seen = [[all_seen[query] for query in queries] for queries in tiles]
    # a place that no query sees has no partner: its tile takes the first, no times
    keys = [sorted({place for places in tile for place in places}) or [0] for tile in seen]
    most_queries, most_keys = max(map(len, tiles)), max(map(len, keys))
    query_table = torch.full((len(tiles), most_queries), -1)
    # unused keys repeat one of the tile: what is not finite elsewhere does not come in
    key_table = torch.tensor([places[:1] for places in keys]).repeat(1, most_keys)
    times = torch.zeros(len(tiles), most_queries, most_keys)
    across = area.size[axis] if side == "queries" else area.out[axis]
    holders: list[list[tuple[int, int]]] = [[] for _ in range(across)]
    for i, (queries, places) in enumerate(zip(tiles, keys, strict=True)):
        query_table[i, : len(queries)] = torch.tensor(queries)
        key_table[i, : len(places)] = torch.tensor(places)
        slot = {place: j for j, place in enumerate(places)}
        for place in places:
            holders[place].append((i, slot[place]))
        for row, neighbors in enumerate(seen[i]):
            for place in neighbors:
                times[i, row, slot[place]] += 1
        times[i, len(queries) :, 0] = 1  # unused rows see something: no NaN
    return _Line(query_table, key_table, times, holders)


def _flat(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """[tiles, slots] per axis -> [tiles, slots] of both, row-major places of a map that wide."""
    both = rows[:, None, :, None] * width + columns[None, :, None, :]
    return both.reshape(len(rows) * len(columns), -1)


def _blocks(area: Neighborhood, side: str, rows: int, step: int) -> Blocks:
    shapes = [(high, rows // high) for high in (1 << n for n in range(rows.bit_length()))]

    def made(shape: tuple[int, int]) -> tuple[_Line, _Line]:
        return _line(area, 0, shape[0], side), _line(area, 1, shape[1], side)

    def cost(lines: tuple[_Line, _Line]) -> tuple[int, int]:
        tiles, others = (math.prod(line.keys.shape[axis] for line in lines) for axis in (0, 1))
        return tiles * math.ceil(others / step), tiles * others

    down, right = min(map(made, shapes), key=cost)
    own, other = (area.out, area.size) if side == "queries" else (area.size, area.out)
    index = _flat(down.queries.clamp(min=0), right.queries.clamp(min=0), own[1])
    none = _flat((down.queries < 0).long(), (right.queries < 0).long(), 1) > 0
    times = down.times[:, None, :, None, :, None] * right.times[None, :, None, :, None, :]
    return Blocks(
        rows=index.masked_fill(none, -1),
        others=_flat(down.keys, right.keys, other[1]),
        times=times.reshape(*index.shape, -1),
    )


@cached
def _tiles(area: Neighborhood, device: torch.device, dtype: torch.dtype) -> Tiles:
    # on large maps flat tiles waste less; on small ones whole ones have one halo
    tall = TILE if min(area.out) <= 2 * TILE else (TILE + 1) // 2
    down, right = _line(area, 0, tall), _line(area, 1, TILE)
    (ny, ty), (nx, tx), my, mx = (
        down.queries.shape, right.queries.shape, down.keys.shape[1], right.keys.shape[1],
    )  # fmt: skip
    out_width = area.out[1]
    query_index = _flat(down.queries.clamp(min=0), right.queries.clamp(min=0), out_width).flatten()
    used = _flat((down.queries >= 0).long() * 2, (right.queries >= 0).long(), 1).flatten() == 3
    query_slot = torch.empty(area.out[0] * area.out[1], dtype=torch.int64)
    query_slot[query_index[used]] = used.nonzero().flatten()
    times = down.times[:, None, :, None, :, None] * right.times[None, :, None, :, None, :]
    # where each place is held as a key: every tile of its row meets every tile of its column
    tiles_down, slots_down = _held(down.holders)
    tiles_right, slots_right = _held(right.holders)
    none = (tiles_down < 0)[:, None, :, None] | (tiles_right < 0)[None, :, None, :]
    tile = tiles_down[:, None, :, None] * nx + tiles_right[None, :, None, :]
    slot = slots_down[:, None, :, None] * mx + slots_right[None, :, None, :]
    count, keys = ny * nx, my * mx
    key_slots = (tile * keys + slot).masked_fill(none, count * keys)
    return Tiles(
        count=count,
        queries=ty * tx,
        keys=keys,
        query_index=query_index.to(device),
        key_index=_flat(down.keys, right.keys, area.size[1]).flatten().to(device),
        used=None if bool(used.all()) else used[:, None].to(device, dtype),
        log_times=times.reshape(count, ty * tx, keys).to(dtype).log().to(device),
        query_slot=query_slot.to(device),
        key_slots=key_slots.reshape(-1).to(device),
        copies=tiles_down.shape[1] * tiles_right.shape[1],
    )


def _held(holders: list[list[tuple[int, int]]]) -> tuple[Tensor, Tensor]:
    """(tiles, slots), each [places, most holders], -1 where there are fewer."""
    most = max(1, *map(len, holders))
    table = torch.full((len(holders), most, 2), -1)
    for place, held in enumerate(holders):
        for i, (tile, slot) in enumerate(held):
            table[place, i, 0], table[place, i, 1] = tile, slot
    return table[..., 0], table[..., 1]
