"""Which class each (query, key) pair has. Nothing else in the library knows geometry."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .caches import kept

__all__ = ["Layout", "Pairs"]


_CPU = torch.device("cpu")  # geometry is worked out there, also under torch.device("meta")


class Pairs(NamedTuple):
    """The pairs that exist, sorted by class (and within a class by query, then key).

    ``query``, ``key``: int32 [pairs], places in the query set and in the key set.
    ``flat``: int32 [pairs], ``query * n_keys + key``.
    ``slot``: int32 [n_queries * n_keys], where each dense cell is found in the sorted list;
    absent pairs point one past its end.
    ``starts``: class ``c`` owns the pairs ``starts[c] : starts[c + 1]``.
    """

    query: Tensor
    key: Tensor
    flat: Tensor
    slot: Tensor
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The class of every (query, key) pair of tokens on a grid.

    Tokens are ``prefix`` tokens without a place, then the grid in row-major order. On the grid the
    class of a pair is its offset, position(query) - position(key), counted from the most negative
    offset, the last axis fastest. After the offsets come the prefix classes: ``prefix**2``
    prefix -> prefix (query-major), ``prefix`` prefix query -> grid key, ``prefix`` grid query ->
    prefix key.

    Args:
        grid: tokens per axis (1 to 3 axes) that the tables are made for. An int means one axis.
        causal: only keys at or before the query (one axis only). A prefix token then sees the
            prefix alone, and the classes prefix query -> grid key do not exist.
        window: largest offset per axis, in steps of ``dilation``; None is no limit. A window of w
            is a neighbourhood of 2w + 1 steps, as a convolution of kernel 2w + 1.
        dilation: only offsets that are multiples of it, per axis.
        buckets: classes on each side of offset 0, per axis: exact near, log-spaced far, and
            everything beyond the grid shares the last one. None is one class per offset.
        prefix: tokens without a place (class token, registers).
        prefix_queries: only the prefix tokens ask; tables hold no other rows.
        input_grid: the grid of this input. At most ``grid``, except on an axis with buckets or
            with a window that ``grid`` holds whole: there it may be any size.
        queries, keys: the tokens (places in prefix + grid) on each side; None is all of them.
        share: (rank, ranks): only the classes rank, rank + ranks, ... exist, numbered 0, 1, ...;
            the pairs of all others are absent. None is all of them. Dealt out in turn, every
            rank gets near and far offsets, so about as many pairs as the others.

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
    share: tuple[int, int] | None = None

    # What follows from the above; plain attributes, so that tracing reads them as constants.
    key: str = field(init=False, compare=False, repr=False, default="")
    """This layout as a string, from which `parse` rebuilds it (operators carry it)."""
    axis_classes: tuple[int, ...] = field(init=False, compare=False, repr=False, default=())
    """How many offset classes each axis has; the grid's classes are their product."""
    offset_classes: int = field(init=False, compare=False, repr=False, default=0)
    """Rows of a table that belong to offsets; those of the prefix follow them."""
    classes: int = field(init=False, compare=False, repr=False, default=0)
    """Rows of a table."""
    tokens: int = field(init=False, compare=False, repr=False, default=0)
    """Tokens of the whole input, prefix included."""
    n_queries: int = field(init=False, compare=False, repr=False, default=0)
    n_keys: int = field(init=False, compare=False, repr=False, default=0)
    full: bool = field(init=False, compare=False, repr=False, default=False)
    """Every query has every key."""
    plain_causal: bool = field(init=False, compare=False, repr=False, default=False)
    """All tokens ask all tokens that are not after them, and nothing else is restricted."""
    may_be_empty: bool = field(init=False, compare=False, repr=False, default=False)
    """Some query may have no key at all."""
    row: tuple[int, int] | None = field(init=False, compare=False, repr=False, default=None)
    """(count, step) where the last token alone asks, and sees itself and every `step`-th token
    before it, `count` in all, which have the classes 0, 1, 2 and so on. Else None."""

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
        if not isinstance(self.prefix, int) or self.prefix < 0:
            raise ValueError(f"prefix: got {self.prefix!r}, want an int of at least 0")
        if self.causal and axes > 1:
            raise ValueError(f"causal: needs a grid of one axis, got grid {grid}")
        if self.prefix_queries and not self.prefix:
            raise ValueError("prefix_queries: needs at least one prefix token, got prefix 0")
        put("input_grid", _sizes("input_grid", self.input_grid or grid, axes, 1))
        for axis, (size, most) in enumerate(zip(self.input_grid, grid, strict=True)):
            if size > most and not self._unbounded(axis):
                raise ValueError(
                    f"grid: got {size} tokens on axis {axis}, but the tables are made for at most "
                    f"{most}; make them larger, or use buckets or a window"
                )
        sides = [len(self.bucket_starts(axis)) for axis in range(axes)]
        put("axis_classes", tuple(n + 1 if self.causal else 2 * n + 1 for n in sides))
        put("offset_classes", 0 if self.prefix_queries else math.prod(self.axis_classes))
        outward = 0 if self.causal else self.prefix
        inward = 0 if self.prefix_queries else self.prefix
        put("classes", self.offset_classes + self.prefix**2 + outward + inward)
        if self.share is not None:
            rank, ranks = _check_share(self.share)
            put("offset_classes", len(range(rank, self.offset_classes, ranks)))
            put("classes", len(range(rank, self.classes, ranks)))
        put("tokens", self.prefix + math.prod(self.input_grid))
        for name in ("queries", "keys"):
            put(name, self._tokens(name, getattr(self, name)))
        put("n_queries", self._count(self.queries, self.prefix if self.prefix_queries else None))
        put("n_keys", self._count(self.keys))
        limited = any(self._limited(axis, n) for axis, n in enumerate(self.input_grid))
        limited = limited and not self.prefix_queries
        alone = self.share is None
        put("full", alone and not limited and not (self.causal and self.prefix))
        put("may_be_empty", self.keys is not None or not alone)
        whole = self.queries is None and self.keys is None and not self.prefix and alone
        unlimited = self.window is None and self.dilation == (1,)
        put("plain_causal", whole and self.causal and unlimited)
        put("row", self._row())
        put("key", _key(self))

    def _count(self, some: tuple[int, ...] | None, every: int | None = None) -> int:
        if some is not None:
            return len(some)
        return self.tokens if every is None else every

    def _limited(self, axis: int, size: int) -> bool:
        """Whether some pair is absent on this axis."""
        w = None if self.window is None else self.window[axis]
        near = w is not None and w < size - 1
        later = self.causal and self.queries != (self.tokens - 1,)  # nothing is after the last
        return size > 1 and (later or self.dilation[axis] > 1 or near)

    # -- the table ---------------------------------------------------------------------------

    @property
    def unbounded(self) -> bool:
        """Whether an input may be of any size on every axis."""
        return all(self._unbounded(axis) for axis in range(len(self.grid)))

    @property
    def reach(self) -> tuple[int | None, ...]:
        """The farthest that a query sees on each axis, in tokens; None where nothing limits it."""
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
        """The least distance, in steps of `dilation`, of each class beside 0 on an axis, rising."""
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

    def _row(self) -> tuple[int, int] | None:
        whole = self.causal and not self.prefix and self.keys is None and self.share is None
        if not whole or self.queries != (self.tokens - 1,):
            return None
        step, w = self.dilation[0], None if self.window is None else self.window[0]
        most = (self.tokens - 1) // step
        most = most if w is None else min(w, most)
        starts = self.bucket_starts(0)
        if most and (len(starts) < most or starts[most - 1] != most):
            return None  # some of them share a class
        return most + 1, step

    def at(self, grid: int | Sequence[int]) -> Layout:
        """The same tables on another input grid."""
        sizes = _sizes("grid", grid, len(self.grid), 1) or ()
        return dataclasses.replace(self, input_grid=sizes)

    def select(
        self, queries: Sequence[int] | None = None, keys: Sequence[int] | None = None
    ) -> Layout:
        """The same tables for a part of the tokens, such as one new query against all keys."""
        return dataclasses.replace(
            self,
            queries=None if queries is None else tuple(queries),
            keys=None if keys is None else tuple(keys),
        )

    def part(self, rank: int, ranks: int) -> Layout:
        """Only every `ranks`-th class, from `rank` on: `share`."""
        return _part(self, rank, ranks)

    def _tokens(self, name: str, value: Any) -> tuple[int, ...] | None:
        if value is None:
            return None
        value = tuple(int(v) for v in value)
        most = self.prefix if name == "queries" and self.prefix_queries else self.tokens
        for v in value:
            if not 0 <= v < most:
                raise ValueError(f"{name}: got token {v}, want 0 to {most - 1}")
        return value

    @staticmethod
    def parse(key: str) -> Layout:
        """The layout of a `key`."""
        return _parse(key)

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """int64 [grid tokens, axes]: the place of every grid token of this input."""
        axes = [torch.arange(n, device=device or _CPU) for n in self.input_grid]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))

    @property
    def index(self) -> Tensor:
        """int64 [queries, keys]: the class of each pair, -1 where the pair is absent."""
        return self.index_on("cpu").clone()

    def index_on(self, device: torch.device | str) -> Tensor:
        """`index` on a device. Built once per layout and device: do not write to it."""
        return _index(self, torch.device(device))

    def pairs_on(self, device: torch.device | str) -> Pairs:
        """The pairs sorted by class. Built once per layout and device: do not write to them."""
        return _pairs(self, torch.device(device))

    def _build(self) -> Tensor:
        if self.share is not None:
            rank, ranks = self.share
            index = _index(dataclasses.replace(self, share=None), _CPU)
            own = (index >= 0) & (index % ranks == rank)
            return torch.where(own, index // ranks, -1)
        # only the rows and columns that are asked for: one new query costs as much as it has keys
        p, every = self.prefix, torch.arange(self.tokens, device=_CPU)
        queries = every[:p] if self.prefix_queries else every
        query = (queries if self.queries is None else _tensor(self.queries))[:, None]
        key = (every if self.keys is None else _tensor(self.keys))[None, :]
        index = torch.zeros((), dtype=torch.int64, device=_CPU)
        present = torch.ones((), dtype=torch.bool, device=_CPU)
        for axis, (size, count) in enumerate(zip(self.input_grid, self.axis_classes, strict=True)):
            cls, here = self._axis_class(axis, torch.arange(1 - size, size, device=_CPU))
            stride = math.prod(self.input_grid[axis + 1 :])
            place = ((query - p) // stride % size) - ((key - p) // stride % size) + size - 1
            index, present = index * count + cls[place], present & here[place]
        index = index.masked_fill(~present, -1)
        if p:
            inner, outward = self.offset_classes, self.offset_classes + p * p
            inward = outward if self.causal else outward + p
            away = torch.full_like(query, -1) if self.causal else outward + query
            index = torch.where(query < p, away, index)
            index = torch.where(key < p, inward + key, index)
            index = torch.where((query < p) & (key < p), inner + query * p + key, index)
        return index

    def _axis_class(self, axis: int, offset: Tensor) -> tuple[Tensor, Tensor]:
        """The class of each offset on one axis, and whether the pair is there."""
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
    """One int per axis from an int or a sequence."""
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
        fine = isinstance(size, int) and not isinstance(size, bool) and size >= least
        if not (fine or (optional and size is None)):
            raise ValueError(f"{name}: got {value!r}, want {kind} of at least {least} per axis")
    return None if optional and all(size is None for size in sizes) else sizes


def _check_share(share: Any) -> tuple[int, int]:
    ints = isinstance(share, tuple) and [type(n) for n in share] == [int, int]
    if not ints or not 0 <= share[0] < share[1]:
        raise ValueError(f"share: got {share!r}, want (rank, ranks) with 0 <= rank < ranks")
    return share


def _tensor(tokens: tuple[int, ...]) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=_CPU)


def _key(layout: Layout) -> str:
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
def _parse(key: str) -> Layout:
    fields = json.loads(key)
    for name, value in fields.items():
        if name in ("queries", "keys") and isinstance(value, str):
            start, stop = value.split(":")
            value = range(int(start), int(stop))
        fields[name] = tuple(value) if isinstance(value, list | range) else value
    return Layout(**fields)


@functools.lru_cache(maxsize=256)
def _part(layout: Layout, rank: int, ranks: int) -> Layout:
    return dataclasses.replace(layout, share=(rank, ranks))


@kept
def _index(layout: Layout, device: torch.device) -> Tensor:
    return layout._build() if device.type == "cpu" else _index(layout, _CPU).to(device)


@kept
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
