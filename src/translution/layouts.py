"""Geometry: which matrix of a table each (query, key) pair of tokens uses.

A table holds one projection matrix per *offset class*. A `Layout` gives each pair of tokens the
number of its class, or -1 where the query does not see the key. Grids, causality, windows, buckets
and prefix tokens are all expressed here, and no other module computes positions or offsets.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .caches import cached

__all__ = ["Layout", "OptionalSizes", "Pairs", "Sizes"]

Sizes = int | Sequence[int]
"""One int for every axis, or one int per axis."""
OptionalSizes = int | Sequence[int | None] | None
"""The same, where None sets no limit (on all axes, or on one of them)."""

# Geometry is always computed on the CPU, also inside `with torch.device("meta")`.
_CPU = torch.device("cpu")


class Pairs(NamedTuple):
    """The pairs that exist, sorted by class, and within a class by query and then by key.

    Attributes:
        query, key: int32 [pairs], the position of each pair's query among the queries, and of its
            key among the keys.
        flat: int32 [pairs], `query * n_keys + key`: the pair's cell in the [queries, keys] matrix.
        slot: int32 [n_queries * n_keys], the inverse of `flat`: where each cell is in the sorted
            list. Cells of absent pairs hold the number of pairs, one past the end.
        starts: the pairs of class `c` are `starts[c] : starts[c + 1]`.
    """

    query: Tensor
    key: Tensor
    flat: Tensor
    slot: Tensor
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The class of every (query, key) pair of tokens on a grid.

    The tokens are `prefix` tokens without a position, then the tokens of the grid in row-major
    order. Two grid tokens have the class of their offset, position(query) - position(key); offsets
    are numbered from the most negative one, the last axis fastest. After them come the classes of
    pairs with a prefix token: `prefix**2` for prefix query and prefix key (query-major), `prefix`
    for prefix query and grid key, `prefix` for grid query and prefix key. A class here is a row of
    a table and has nothing to do with the classes of a classifier.

    Args:
        grid: tokens per axis (1 to 3 axes) that the tables are made for. An int means one axis.
        causal: a query sees only keys at or before it (one axis only). A prefix token then sees
            prefix tokens only, and the classes of prefix query and grid key do not exist.
        window: the largest offset that is seen, per axis, in steps of `dilation`. A window of w
            covers 2w + 1 positions, as a convolution of kernel size 2w + 1 does. None sets no
            limit.
        dilation: only offsets that are multiples of this number are seen, per axis.
        buckets: the number of classes on each side of offset 0, per axis. Near offsets have a class
            each, farther ones share classes that grow with the logarithm of the distance, and all
            offsets beyond the grid have the last class. None gives every offset its own class.
        prefix: the number of tokens without a position (class token, registers).
        prefix_queries: only the prefix tokens are queries, and tables hold no other classes.
        input_grid: the grid of the input at hand. It is at most `grid`, except on an axis with
            buckets, or with a window that fits into `grid`: there it may have any size.
        queries, keys: the tokens that are queries, or keys, as positions in prefix + grid. None
            means all tokens.
        shard: (rank, world size) of a table that is divided over processes: only the classes rank,
            rank + world size, ... exist here, renumbered 0, 1, ..., and the pairs of all other
            classes are absent. Taking every n-th class gives each process near and far offsets, and
            with them about the same number of pairs. None is the whole table.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """

    grid: tuple[int, ...]
    causal: bool = False
    window: tuple[int | None, ...] | None = None
    dilation: tuple[int, ...] = ()
    buckets: tuple[int | None, ...] | None = None
    prefix: int = 0
    prefix_queries: bool = False
    input_grid: tuple[int, ...] = ()
    queries: tuple[int, ...] | None = None
    keys: tuple[int, ...] | None = None
    shard: tuple[int, int] | None = None

    # Derived values. They are plain attributes so that tracing reads them as constants.
    spec: str = field(init=False, compare=False, repr=False, default="")
    """This layout as a string: the registered operators take it, and `parse` reads it."""
    axis_classes: tuple[int, ...] = field(init=False, compare=False, repr=False, default=())
    """The number of offset classes of each axis. Their product is the number for the grid."""
    offset_classes: int = field(init=False, compare=False, repr=False, default=0)
    """The number of a table's rows that belong to offsets. The rows of prefix pairs follow."""
    classes: int = field(init=False, compare=False, repr=False, default=0)
    """The number of rows of a table."""
    tokens: int = field(init=False, compare=False, repr=False, default=0)
    """The number of tokens of the input, including the prefix."""
    n_queries: int = field(init=False, compare=False, repr=False, default=0)
    n_keys: int = field(init=False, compare=False, repr=False, default=0)
    full: bool = field(init=False, compare=False, repr=False, default=False)
    """True only if every query sees every key."""
    plain_causal: bool = field(init=False, compare=False, repr=False, default=False)
    """True only if every token sees exactly the tokens at or before it. It may be False although
    that is so, as for a causal layout with a window that is wider than the input."""
    may_be_empty: bool = field(init=False, compare=False, repr=False, default=False)
    """Whether some query may see no key at all."""
    single_query: tuple[int, int] | None = field(
        init=False, compare=False, repr=False, default=None
    )
    """(count, step) for the layout of text generation: the last token is the only query, and it
    sees itself and every `step`-th token before it, `count` tokens in all, which have the classes
    0, 1, 2, and so on. None for every other layout."""

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        grid = _sizes("grid", self.grid, None, 1) or ()
        if not 1 <= len(grid) <= 3:
            raise ValueError(f"grid: got {len(grid)} axes, want 1, 2 or 3")
        axes = len(grid)
        put("grid", grid)
        put("window", _sizes("window", self.window, axes, 0, optional=True))
        put("dilation", _sizes("dilation", 1 if self.dilation == () else self.dilation, axes, 1))
        put("buckets", _sizes("buckets", self.buckets, axes, 1, optional=True))
        if type(self.prefix) is not int or self.prefix < 0:
            raise ValueError(f"prefix: got {self.prefix!r}, want an int of at least 0")
        for name in ("causal", "prefix_queries"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, want True or False")
        if self.causal and axes > 1:
            raise ValueError(f"causal: needs a grid of one axis, got grid {grid}")
        if self.prefix_queries and not self.prefix:
            raise ValueError("prefix_queries: needs at least one prefix token, got prefix 0")
        put("input_grid", _sizes("input_grid", self.input_grid or grid, axes, 1))
        for axis, (size, most) in enumerate(zip(self.input_grid, grid, strict=True)):
            if size > most and not self._unbounded(axis):
                raise ValueError(
                    f"grid: got {size} tokens on axis {axis}, but the tables are made for at most "
                    f"{most}; translution.resize_offsets makes them larger, and a layer with "
                    "buckets or a window takes any size"
                )
        sides = [len(self.bucket_starts(axis)) for axis in range(axes)]
        put("axis_classes", tuple(n + 1 if self.causal else 2 * n + 1 for n in sides))
        put("offset_classes", 0 if self.prefix_queries else math.prod(self.axis_classes))
        outward_classes = 0 if self.causal else self.prefix
        inward_classes = 0 if self.prefix_queries else self.prefix
        prefix_classes = self.prefix**2 + outward_classes + inward_classes
        put("classes", self.offset_classes + prefix_classes)
        if self.shard is not None:
            rank, world_size = _check_shard(self.shard)
            put("offset_classes", len(range(rank, self.offset_classes, world_size)))
            put("classes", len(range(rank, self.classes, world_size)))
        put("tokens", self.prefix + math.prod(self.input_grid))
        for name in ("queries", "keys"):
            put(name, self._tokens(name, getattr(self, name)))
        put("n_queries", self._count(self.queries, self.prefix if self.prefix_queries else None))
        put("n_keys", self._count(self.keys))
        limited = any(self._limited(axis, n) for axis, n in enumerate(self.input_grid))
        limited = limited and not self.prefix_queries
        undivided = self.shard is None
        put("full", undivided and not limited and not (self.causal and self.prefix))
        put("may_be_empty", self.keys is not None or not undivided)
        whole = self.queries is None and self.keys is None and not self.prefix and undivided
        unlimited = self.window is None and self.dilation == (1,)
        put("plain_causal", whole and self.causal and unlimited)
        put("single_query", self._single_query())
        put("spec", _spec(self))

    def _count(self, chosen: tuple[int, ...] | None, available: int | None = None) -> int:
        if chosen is not None:
            return len(chosen)
        return self.tokens if available is None else available

    def _limited(self, axis: int, size: int) -> bool:
        """Whether some pair is absent because of this axis."""
        w = None if self.window is None else self.window[axis]
        near = w is not None and w < size - 1
        later = self.causal and self.queries != (self.tokens - 1,)  # no token follows the last
        return size > 1 and (later or self.dilation[axis] > 1 or near)

    # -- the table ---------------------------------------------------------------------------

    @property
    def unbounded(self) -> bool:
        """Whether an input may be of any size on every axis."""
        return all(self._unbounded(axis) for axis in range(len(self.grid)))

    @property
    def reach(self) -> tuple[int | None, ...]:
        """The largest distance that a query sees on each axis, in tokens. None: no limit."""
        windows = self.window or (None,) * len(self.grid)
        pairs = zip(windows, self.dilation, strict=True)
        return tuple(None if w is None else w * dilation for w, dilation in pairs)

    def _unbounded(self, axis: int) -> bool:
        window, buckets = self.window, self.buckets
        if buckets is not None and buckets[axis] is not None:
            return True
        w = None if window is None else window[axis]
        return w is not None and w * self.dilation[axis] <= self.grid[axis] - 1

    def bucket_starts(self, axis: int) -> list[int]:
        """The smallest distance, in steps of `dilation`, of each class on one side of offset 0.

        The list rises, and has one entry per class.
        """
        reach = (self.grid[axis] - 1) // self.dilation[axis]
        w = None if self.window is None else self.window[axis]
        if w is not None:
            reach = min(reach, w)
        n = None if self.buckets is None else self.buckets[axis]
        if n is None or n >= reach:
            return list(range(1, reach + 1))
        exact = (n + 1) // 2
        starts = list(range(1, exact + 1))
        ratio = (reach + 1) / (exact + 1)
        for i in range(n - exact):
            spaced = math.floor((exact + 1) * ratio ** (i / (n - exact)) + 1e-9)
            starts.append(max(starts[-1] + 1, spaced))
        return starts

    def _single_query(self) -> tuple[int, int] | None:
        whole = self.causal and not self.prefix and self.keys is None and self.shard is None
        if not whole or self.queries != (self.tokens - 1,):
            return None
        step, w = self.dilation[0], None if self.window is None else self.window[0]
        most = (self.tokens - 1) // step
        most = most if w is None else min(w, most)
        starts = self.bucket_starts(0)
        if most and (len(starts) < most or starts[most - 1] != most):
            return None  # several distances share a class
        return most + 1, step

    def at(self, grid: int | Sequence[int]) -> Layout:
        """The same tables on another input grid."""
        sizes = _sizes("grid", grid, len(self.grid), 1) or ()
        return dataclasses.replace(self, input_grid=sizes)

    def select(
        self, queries: Sequence[int] | None = None, keys: Sequence[int] | None = None
    ) -> Layout:
        """The same tables for some of the tokens, such as one new query and all keys."""
        return dataclasses.replace(
            self,
            queries=None if queries is None else tuple(queries),
            keys=None if keys is None else tuple(keys),
        )

    def sharded(self, rank: int, world_size: int) -> Layout:
        """The same layout with the `shard` (rank, world_size)."""
        return _sharded(self, rank, world_size)

    def _tokens(self, name: str, value: Any) -> tuple[int, ...] | None:
        if value is None:
            return None
        try:
            value = tuple(operator.index(v) for v in value)
        except TypeError:
            raise ValueError(f"{name}: got {value!r}, want ints, or None for all tokens") from None
        most = self.prefix if name == "queries" and self.prefix_queries else self.tokens
        for v in value:
            if not 0 <= v < most:
                raise ValueError(f"{name}: got token {v}, want 0 to {most - 1}")
        return value

    @staticmethod
    def parse(spec: str) -> Layout:
        """The layout that a `spec` describes."""
        return _parse(spec)

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """The position of every grid token of this input, int64 [grid tokens, axes]."""
        axes = [torch.arange(n, device=device or _CPU) for n in self.input_grid]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))

    @property
    def index(self) -> Tensor:
        """The class of each pair, int64 [queries, keys]; -1 where the pair is absent."""
        return self.index_on("cpu").clone()

    def index_on(self, device: torch.device | str) -> Tensor:
        """`index` on a device. It is cached: do not write to it."""
        return _index(self, torch.device(device))

    def pairs_on(self, device: torch.device | str) -> Pairs:
        """The pairs sorted by class, on a device. They are cached: do not write to them."""
        return _pairs(self, torch.device(device))

    def _build(self) -> Tensor:
        if self.shard is not None:
            rank, world_size = self.shard
            index = _index(dataclasses.replace(self, shard=None), _CPU)
            own = (index >= 0) & (index % world_size == rank)
            return torch.where(own, index // world_size, -1)
        # Only the chosen rows and columns are computed, so that one new query costs one row.
        p, tokens = self.prefix, torch.arange(self.tokens, device=_CPU)
        queries = tokens[:p] if self.prefix_queries else tokens
        query = (queries if self.queries is None else _tensor(self.queries))[:, None]
        key = (tokens if self.keys is None else _tensor(self.keys))[None, :]
        index = torch.zeros((), dtype=torch.int64, device=_CPU)
        present = torch.ones((), dtype=torch.bool, device=_CPU)
        for axis, (size, count) in enumerate(zip(self.input_grid, self.axis_classes, strict=True)):
            cls, here = self._axis_class(axis, torch.arange(1 - size, size, device=_CPU))
            stride = math.prod(self.input_grid[axis + 1 :])
            place = ((query - p) // stride % size) - ((key - p) // stride % size) + size - 1
            index, present = index * count + cls[place], present & here[place]
        index = index.masked_fill(~present, -1)
        if p:
            # the first class of each kind of pair: within the prefix, from it, and to it
            within, outward = self.offset_classes, self.offset_classes + p * p
            inward = outward if self.causal else outward + p
            from_prefix = torch.full_like(query, -1) if self.causal else outward + query
            index = torch.where(query < p, from_prefix, index)
            index = torch.where(key < p, inward + key, index)
            index = torch.where((query < p) & (key < p), within + query * p + key, index)
        return index

    def _axis_class(self, axis: int, offset: Tensor) -> tuple[Tensor, Tensor]:
        """The class of each offset on one axis, and whether that offset is seen."""
        dilation = self.dilation[axis]
        starts = torch.tensor(self.bucket_starts(axis), dtype=torch.int64, device=_CPU)
        step = torch.div(offset, dilation, rounding_mode="floor")
        here = offset % dilation == 0
        w = None if self.window is None else self.window[axis]
        if w is not None:
            here &= step.abs() <= w
        if self.causal:
            here &= step >= 0
        bucket = torch.bucketize(step.abs(), starts, right=True)
        return (bucket if self.causal else len(starts) + step.sign() * bucket), here


def _sizes(
    name: str, value: Any, axes: int | None, least: int, optional: bool = False
) -> tuple[Any, ...] | None:
    """An int or a sequence as one int per axis."""
    if value is None and optional:
        return None
    kind = "an int" + (" or None" if optional else "")
    one = isinstance(value, int) and not isinstance(value, bool)
    try:
        sizes = (value,) * (axes or 1) if one else tuple(value)
    except TypeError:
        raise ValueError(f"{name}: got {value!r}, want {kind} or one per axis") from None
    if axes is not None and len(sizes) != axes:
        raise ValueError(f"{name}: got {sizes}, want {kind} or {axes} of them, one per axis")
    for size in sizes:
        valid = isinstance(size, int) and not isinstance(size, bool) and size >= least
        if not (valid or (optional and size is None)):
            raise ValueError(f"{name}: got {value!r}, want {kind} of at least {least} per axis")
    return None if optional and all(size is None for size in sizes) else sizes


def _check_shard(shard: Any) -> tuple[int, int]:
    ints = isinstance(shard, tuple) and [type(n) for n in shard] == [int, int]
    if not ints or not 0 <= shard[0] < shard[1]:
        raise ValueError(
            f"shard: got {shard!r}, want (rank, world size) with 0 <= rank < world size"
        )
    return shard


def _tensor(tokens: tuple[int, ...]) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=_CPU)


def _spec(layout: Layout) -> str:
    fields = {}
    for given in dataclasses.fields(layout):
        value = getattr(layout, given.name)
        if given.name in ("queries", "keys") and value and value == _range(value):
            value = f"{value[0]}:{value[-1] + 1}"
        if given.init and value != given.default:
            fields[given.name] = value
    return json.dumps(fields, separators=(",", ":"))


def _range(value: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(value[0], value[0] + len(value)))


@functools.lru_cache(maxsize=4096)
def _parse(spec: str) -> Layout:
    fields = json.loads(spec)
    for name, value in fields.items():
        if name in ("queries", "keys") and isinstance(value, str):
            start, stop = value.split(":")
            value = range(int(start), int(stop))
        fields[name] = tuple(value) if isinstance(value, list | range) else value
    return Layout(**fields)


@functools.lru_cache(maxsize=256)
def _sharded(layout: Layout, rank: int, world_size: int) -> Layout:
    return dataclasses.replace(layout, shard=(rank, world_size))


@cached
def _index(layout: Layout, device: torch.device) -> Tensor:
    return layout._build() if device.type == "cpu" else _index(layout, _CPU).to(device)


@cached
def _pairs(layout: Layout, device: torch.device) -> Pairs:
    if device.type != "cpu":
        pairs = _pairs(layout, _CPU)
        query, key, flat, slot = (t.to(device) for t in pairs[:4])
        return Pairs(query, key, flat, slot, pairs.starts)
    index = _index(layout, _CPU).reshape(-1)
    n_keys = max(layout.n_keys, 1)
    order = torch.argsort(index, stable=True)
    flat = order[int((index < 0).sum()) :]
    slot = torch.full_like(index, len(flat))
    slot[flat] = torch.arange(len(flat), device=_CPU)
    counts = torch.bincount(index[flat], minlength=layout.classes)
    starts = (0, *counts.cumsum(0).tolist())
    query, key = flat // n_keys, flat % n_keys
    return Pairs(query.int(), key.int(), flat.int(), slot.int(), starts)
