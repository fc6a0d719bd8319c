"""The index tables that the kernels read: made once per layout, device and batch, then kept.

Everything that a call looks up lies on the device already when the same shape comes again, so that
no call waits for the host and a step can be captured in a CUDA graph (`caches` keeps the tables).
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
    """The tokens of the pairs in the order of their classes, on the device."""

    query: Tensor  # int32 [pairs]
    key: Tensor  # int32 [pairs]
    bounds: Tensor  # int32 [classes + 1]: the first pair of each class


@cached
def sides(layout: Layout, device: torch.device) -> Sides:
    """The tokens of the pairs, and where each class begins."""
    pairs = layout.pairs_on("cpu")
    bounds = torch.tensor(pairs.starts, dtype=torch.int32)
    return Sides(pairs.query.to(device), pairs.key.to(device), bounds.to(device))


class Tiles(NamedTuple):
    """The tiles of rows that `pair_products` takes."""

    table: Tensor  # int32 [tiles, 3]: class, first row, the row after the last of its class
    first: tuple[int, ...]  # [classes + 1]: the first tile of each class


@cached
def tiles(layout: Layout, device: torch.device, batch: int, rows: int) -> Tiles:
    """Tiles of at most so many rows, each of one class."""
    starts = torch.tensor(layout.pairs_on("cpu").starts) * batch
    counts = -(-(starts[1:] - starts[:-1]) // rows)
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    cls = torch.arange(len(counts)).repeat_interleave(counts)
    row = starts[:-1][cls] + (torch.arange(len(cls)) - first[cls]) * rows
    table = torch.stack([cls, row, starts[1:][cls]], -1).int()
    return Tiles(table.to(device), tuple(first.tolist()))


class Chunks(NamedTuple):
    """Runs of classes whose rows are in memory at the same time, going back."""

    classes: tuple[tuple[int, int], ...]  # first class, and one past the last, of each chunk
    pairs: tuple[tuple[int, int], ...]  # likewise their pairs
    most: int
    """pairs of the largest chunk"""
    limit: int
    """what it was made for: names the chunks where other tables are made for them"""


@cached
def chunks(layout: Layout, device: torch.device, limit: int) -> Chunks:
    """Classes that together have at most `limit` pairs (but at least one class)."""
    starts, found, first = layout.pairs_on("cpu").starts, list[tuple[int, int]](), 0
    for cls in range(1, len(starts)):
        if cls == len(starts) - 1 or starts[cls + 1] - starts[first] > limit:
            found.append((first, cls))
            first = cls
    spans = tuple((starts[first], starts[stop]) for first, stop in found)
    return Chunks(tuple(found), spans, max((b - a for a, b in spans), default=0), limit)


@cached
def largest_first(layout: Layout, device: torch.device, limit: int) -> Tensor:
    """int32 [classes]: within each chunk of this limit the classes, the largest first."""
    starts = torch.tensor(layout.pairs_on("cpu").starts)
    sizes = starts[1:] - starts[:-1]
    order = [
        first + torch.argsort(sizes[first:stop], descending=True, stable=True)
        for first, stop in chunks(layout, device, limit).classes
    ]
    return torch.cat(order).int().to(device)


class Groups(NamedTuple):
    """Tokens that a program sums for together, and the pairs that they have in each class.

    A tile holds BLOCK_M rows. Where the batch has fewer samples, a program takes several tokens: a
    block of neighbours on the grid, since neighbours have nearly the same offsets, so that a matrix
    that was read serves all of them.
    """

    members: Tensor  # int32 [groups, size]: tokens, -1 for none
    classes: Tensor  # int32 [entries]: the class of each entry
    links: Tensor  # int32 [entries, size]: the pair, or the other token, of each member; -1: none
    spans: Tensor  # int32 [chunks, groups, 2]: first entry of each group, and one past its last

    @property
    def size(self) -> int:
        """Tokens of a group at most."""
        return self.members.shape[1]


@cached
def groups(
    layout: Layout, device: torch.device, by_query: bool, by_pair: bool, most: int, limit: int
) -> Groups:
    """Groups of at most `most` tokens on one side.

    Args:
        by_query: whether the tokens are the queries (else the keys).
        by_pair: whether links are pairs (else the tokens of the other side).
        limit: that of the chunks, whose entries then stand apart; 0 is no chunks.
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
    # the grouping that has the fewest entries; with very many pairs the first one will do
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
    if limit:  # not rotated: a walk is then in the order of the classes, and a chunk a part of it
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
    """The order in which a token walks its classes."""

    place: Tensor  # int64 [pairs]: where each pair stands in its token's walk
    turn: int  # places in a circle
    rounds: int  # classes at each place
    several: int  # pairs that one token may have in one class

    @property
    def length(self) -> int:
        return self.turn * self.rounds * self.several

    def classes_at(self, place: Tensor) -> Tensor:
        """The class at each place."""
        place = place // self.several
        found = place % self.rounds * self.turn + place // self.rounds
        return found if len(found) else found.new_zeros(1)


def _walk(layout: Layout, token: Tensor, cls: Tensor, tokens: int, rotate: bool) -> _Walk:
    """The walk of every token, `token` and `cls` being those of the pairs.

    With `rotate` all tokens walk the table alike, so that what is read of it at a time fits in the
    cache: on a grid the classes of a token are a stretch that begins elsewhere for each token;
    taken modulo the longest stretch, all tokens read the same matrices at about the same time.
    """
    turn = layout.classes
    placed = cls < layout.offset_classes
    if rotate and bool(placed.any()):
        low = torch.full((tokens,), turn).scatter_reduce(0, token[placed], cls[placed], "amin")
        high = torch.full((tokens,), -1).scatter_reduce(0, token[placed], cls[placed], "amax")
        turn = max(1, int((high - low).max()) + 1)
    rounds = -(-layout.classes // max(turn, 1))
    # the n-th pair of this token and class: with buckets there are several
    line = cls * tokens + token
    order = torch.argsort(line, stable=True)
    ranked = line[order]
    nth = torch.empty_like(order)
    nth[order] = torch.arange(len(line)) - torch.searchsorted(ranked, ranked)
    several = int(nth.max()) + 1 if len(nth) else 1
    place = ((cls % turn) * rounds + cls // turn) * several + nth
    return _Walk(place, turn, rounds, several)


def _all_tokens(layout: Layout, by_query: bool) -> bool:
    """Whether this side is every token, so that neighbours on the grid can be told."""
    if by_query:
        return layout.queries is None and not layout.prefix_queries
    return layout.keys is None


def _groupings(layout: Layout, tokens: int, whole: bool, most: int) -> list[Tensor]:
    """Ways to put the tokens into groups: int64 [groups, size] each, -1 for none.

    On two axes blocks of every shape of at most `most` tokens; elsewhere runs of tokens.
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
    p, grid, found = layout.prefix, tuple(layout.input_grid), []
    planes = every[p:].view(-1, *((1,) * (2 - len(grid)) + grid[-2:]))
    height = 1
    while height <= min(most, planes.shape[1]):
        width = min(most // height, planes.shape[2])
        # blocks of nearly equal size, rather than full ones and a rest
        down, across = (
            -(-n // -(-n // s)) for n, s in ((planes.shape[1], height), (planes.shape[2], width))
        )
        blocks = [
            block.reshape(-1)
            for plane in planes
            for line in plane.split(down)
            for block in line.split(across, 1)
        ]
        found.append(table([*(every[:p].split(most) if p else ()), *blocks]))
        height *= 2
    return found


@functools.cache
def divisor(batch: int) -> tuple[int, int]:
    """(multiplier, shift) with row // batch = (row · multiplier) >> shift for all rows below 2³¹.

    With l the bits of batch - 1, the multiplier ⌈2^(31+l) / batch⌉ is at least 2³¹ and below 2³²;
    rounding it up adds less than 2^l to batch · multiplier, which is too little to matter for a
    numerator of 31 bits (Granlund and Montgomery, 1994).
    """
    shift = 31 + max(batch - 1, 0).bit_length()
    return -(-(1 << shift) // max(batch, 1)), shift
