"""The index tables that the kernels read, computed once per layout, device and batch.

`caches` keeps them on the device. When the same shape comes again, a call therefore does not wait
for the host, and a training step can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ...caches import cached
from ...layouts import Layout

__all__ = [
    "Chunks",
    "Groups",
    "Sides",
    "Tiles",
    "chunks",
    "divisor",
    "groups",
    "largest_first",
    "sides",
    "tiles",
]


class Sides(NamedTuple):
    """The tokens of the pairs in the order of their classes, on the device.

    Attributes:
        query, key: int32 [pairs], the query token and the key token of each pair.
        bounds: int32 [classes + 1], the first pair of each class; the last entry is the number of
            pairs.
    """

    query: Tensor
    key: Tensor
    bounds: Tensor


@cached
def sides(layout: Layout, device: torch.device) -> Sides:
    """The `Sides` of a layout."""
    pairs = layout.pairs_on("cpu")
    bounds = torch.tensor(pairs.starts, dtype=torch.int32)
    return Sides(pairs.query.to(device), pairs.key.to(device), bounds.to(device))


class Tiles(NamedTuple):
    """The tiles of rows that the programs of `pair_products` take.

    Attributes:
        table: int32 [tiles, 3], the class, the first row, and one past the last row of the class.
        first: [classes + 1], the first tile of each class; the last entry is the number of tiles.
    """

    table: Tensor
    first: tuple[int, ...]


@cached
def tiles(layout: Layout, device: torch.device, batch: int, rows: int) -> Tiles:
    """Divide the rows of each class into tiles of at most `rows` rows."""
    starts = torch.tensor(layout.pairs_on("cpu").starts) * batch
    counts = -(-(starts[1:] - starts[:-1]) // rows)
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    cls = torch.arange(len(counts)).repeat_interleave(counts)
    row = starts[:-1][cls] + (torch.arange(len(cls)) - first[cls]) * rows
    table = torch.stack([cls, row, starts[1:][cls]], -1).int()
    return Tiles(table.to(device), tuple(first.tolist()))


class Chunks(NamedTuple):
    """Consecutive classes whose projected rows exist at the same time in the backward pass.

    Attributes:
        classes: for each chunk, its first class and one past its last.
        pairs: for each chunk, its first pair and one past its last.
        most: the number of pairs of the largest chunk.
        limit: the argument of `chunks`. Other tables are looked up with it.
    """

    classes: tuple[tuple[int, int], ...]
    pairs: tuple[tuple[int, int], ...]
    most: int
    limit: int


@cached
def chunks(layout: Layout, device: torch.device, limit: int) -> Chunks:
    """Divide the classes into chunks of at most `limit` pairs, but at least one class."""
    starts, classes, first = layout.pairs_on("cpu").starts, list[tuple[int, int]](), 0
    for cls in range(1, len(starts)):
        if cls == len(starts) - 1 or starts[cls + 1] - starts[first] > limit:
            classes.append((first, cls))
            first = cls
    spans = tuple((starts[first], starts[stop]) for first, stop in classes)
    return Chunks(tuple(classes), spans, max((b - a for a, b in spans), default=0), limit)


@cached
def largest_first(layout: Layout, device: torch.device, limit: int) -> Tensor:
    """The classes of each chunk of this limit, the largest first: int32 [classes]."""
    starts = torch.tensor(layout.pairs_on("cpu").starts)
    sizes = starts[1:] - starts[:-1]
    order = [
        first + torch.argsort(sizes[first:stop], descending=True, stable=True)
        for first, stop in chunks(layout, device, limit).classes
    ]
    return torch.cat(order).int().to(device)


class Groups(NamedTuple):
    """Groups of tokens that a program sums for, and the pairs that they have in each class.

    A program takes a tile of BLOCK_M rows. If the batch has fewer samples, it takes several tokens:
    a block of neighbours on the grid, since neighbours have nearly the same offsets. A matrix that
    has been loaded then serves all of them. An *entry* is one class for all tokens of a group.

    Attributes:
        members: int32 [groups, size], the tokens of each group; -1 for none.
        classes: int32 [entries], the class of each entry.
        links: int32 [entries, size], the pair (or the other token) that each token of the group has
            in an entry; -1 for none.
        spans: int32 [chunks, groups, 2], the first entry of each group and one past its last.
    """

    members: Tensor
    classes: Tensor
    links: Tensor
    spans: Tensor

    @property
    def size(self) -> int:
        """The largest number of tokens of a group."""
        return self.members.shape[1]


@cached
def groups(
    layout: Layout, device: torch.device, by_query: bool, by_pair: bool, most: int, limit: int
) -> Groups:
    """Divide the tokens of one side into groups.

    Args:
        layout, device: for which the tables are computed.
        by_query: whether the tokens are the queries. If not, they are the keys.
        by_pair: whether links are pairs. If not, they are tokens of the other side.
        most: the largest number of tokens of a group.
        limit: that of the chunks, each of which gets spans of its own; 0 for one span per group.
    """
    pairs = layout.pairs_on("cpu")
    starts = torch.tensor(pairs.starts)
    count = int(starts[-1])
    token, other = (pairs.query, pairs.key) if by_query else (pairs.key, pairs.query)
    token, other = token.long(), other.long()
    tokens = layout.n_queries if by_query else layout.n_keys
    cls = torch.arange(layout.classes).repeat_interleave(starts[1:] - starts[:-1])
    walk = _walk(layout, token, cls, tokens, rotate=not limit)
    whole = _all_tokens(layout, by_query)
    best: tuple[Tensor, ...] | None = None
    # Take the groups with the fewest entries. With very many pairs, trying all takes too long.
    options = _groupings(layout, tokens, whole, most)
    for members in options if count <= 1 << 18 else options[:1]:
        group, member = (torch.empty(tokens, dtype=torch.int64) for _ in range(2))
        there = members >= 0
        n, size = members.shape
        group[members[there]] = torch.arange(n)[:, None].expand(n, size)[there]
        member[members[there]] = torch.arange(size)[None, :].expand(n, size)[there]
        keys, entry = torch.unique(group[token] * walk.length + walk.place, return_inverse=True)
        if best is None or len(keys) < len(best[0]):
            best = keys, entry, members, member
    assert best is not None
    keys, entry, members, member = best
    n, size = members.shape
    links = torch.full((max(1, len(keys)), size), -1)
    links[entry, member[token]] = torch.arange(count) if by_pair else other
    edges = [(0, walk.length)]
    if (
        limit
    ):  # the walk is not rotated: it is in the order of the classes, and a chunk is a part of it
        parted = chunks(layout, device, limit).classes
        edges = [(first * walk.several, stop * walk.several) for first, stop in parted]
    heads = torch.arange(n) * walk.length
    ends = [[torch.searchsorted(keys, heads + at) for at in edge] for edge in edges]
    spans = torch.stack([torch.stack(pair, -1) for pair in ends])
    of = walk.classes_at(keys % walk.length)
    longest = torch.argsort((spans[..., 1] - spans[..., 0]).sum(0), descending=True, stable=True)
    tables = (members[longest], of, links, spans[:, longest])
    return Groups(*(t.int().contiguous().to(device) for t in tables))


class _Walk(NamedTuple):
    """The order in which a program walks over the pairs of a token.

    Attributes:
        place: int64 [pairs], the index of each pair in the walk of its token.
        turn: classes are taken modulo this number.
        rounds: how many classes are equal modulo `turn`.
        several: the largest number of pairs that one token has in one class.
    """

    place: Tensor
    turn: int
    rounds: int
    several: int

    @property
    def length(self) -> int:
        """The number of indices of a walk."""
        return self.turn * self.rounds * self.several

    def classes_at(self, place: Tensor) -> Tensor:
        """The class at each index of a walk."""
        place = place // self.several
        classes = place % self.rounds * self.turn + place // self.rounds
        return classes if len(classes) else classes.new_zeros(1)


def _walk(layout: Layout, token: Tensor, cls: Tensor, tokens: int, rotate: bool) -> _Walk:
    """The walk of every token.

    Without `rotate`, a token walks over its classes in order. On a grid these are an interval that
    begins at another class for each token. Programs that run at the same time then read matrices
    from all over the table, more than fit in the GPU's cache. With `rotate`, classes are taken
    modulo the length of the longest interval, and all programs read the same matrices at about
    the same time.

    Args:
        layout: the layout.
        token, cls: int64 [pairs], the token and the class of each pair.
        tokens: the number of tokens.
        rotate: as described above.
    """
    turn = layout.classes
    placed = cls < layout.offset_classes
    if rotate and bool(placed.any()):
        low = torch.full((tokens,), turn).scatter_reduce(0, token[placed], cls[placed], "amin")
        high = torch.full((tokens,), -1).scatter_reduce(0, token[placed], cls[placed], "amax")
        turn = max(1, int((high - low).max()) + 1)
    rounds = -(-layout.classes // max(turn, 1))
    # With buckets, a token has several pairs in a class. `nth` numbers them.
    line = cls * tokens + token
    order = torch.argsort(line, stable=True)
    ranked = line[order]
    nth = torch.empty_like(order)
    nth[order] = torch.arange(len(line)) - torch.searchsorted(ranked, ranked)
    several = int(nth.max()) + 1 if len(nth) else 1
    place = ((cls % turn) * rounds + cls // turn) * several + nth
    return _Walk(place, turn, rounds, several)


def _all_tokens(layout: Layout, by_query: bool) -> bool:
    """Whether this side consists of all tokens, so that it is known which are neighbours."""
    if by_query:
        return layout.queries is None and not layout.prefix_queries
    return layout.keys is None


def _groupings(layout: Layout, tokens: int, whole: bool, most: int) -> list[Tensor]:
    """Ways to divide the tokens into groups: int64 [groups, size] each, -1 for none.

    On a grid of several axes they are blocks on the last two, one way per shape of a block of at
    most `most` tokens. Otherwise they are consecutive tokens.
    """

    def table(parts: list[Tensor]) -> Tensor:
        rows = torch.full((len(parts), max(map(len, parts))), -1)
        for line, part in zip(rows, parts, strict=True):
            line[: len(part)] = part
        return rows

    every = torch.arange(tokens)
    if most == 1 or tokens == 1:
        return [every[:, None]]
    if not whole:
        return [table(list(every.split(most)))]
    p, grid, ways = layout.prefix, tuple(layout.input_grid), []
    planes = every[p:].view(-1, *((1,) * (2 - len(grid)) + grid[-2:]))
    height = 1
    while height <= min(most, planes.shape[1]):
        width = min(most // height, planes.shape[2])
        # blocks of nearly equal size, and not full ones and a smaller one at the end
        down, across = (
            -(-n // -(-n // s)) for n, s in ((planes.shape[1], height), (planes.shape[2], width))
        )
        blocks = [
            block.reshape(-1)
            for plane in planes
            for line in plane.split(down)
            for block in line.split(across, 1)
        ]
        ways.append(table([*(every[:p].split(most) if p else ()), *blocks]))
        height *= 2
    return ways


@functools.cache
def divisor(batch: int) -> tuple[int, int]:
    """Return (multiplier, shift) so that row // batch = (row · multiplier) >> shift.

    This holds for all rows below 2³¹. Kernels divide this way (`class_kernels.divide`).

    Let l be the number of bits of batch - 1. The multiplier ⌈2^(31+l) / batch⌉ is at least 2³¹ and
    below 2³². Rounding it up adds less than 2^l to batch · multiplier, which does not change the
    quotient of a numerator of 31 bits (Granlund and Montgomery, 1994).
    """
    shift = 31 + max(batch - 1, 0).bit_length()
    return -(-(1 << shift) // max(batch, 1)), shift
