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
        sides = [len(self._bucket_starts(axis)) for axis in range(axes)]
        put("axis_classes", tuple(n + 1 if self.causal else 2 * n + 1 for n in sides))
        put("offset_classes", 0 if self.prefix_queries else math.prod(self.axis_classes))
        outward = 0 if self.causal else self.prefix
        inward = 0 if self.prefix_queries else self.prefix
        put("classes", self.offset_classes + self.prefix**2 + outward + inward)
        put("tokens", self.prefix + math.prod(self.input_grid))
        for name in ("queries", "keys"):
            put(name, self._tokens(name, getattr(self, name)))
        put("n_queries", self._count(self.queries, self.prefix if self.prefix_queries else None))
        put("n_keys", self._count(self.keys))
        limited = any(self._limited(axis, n) for axis, n in enumerate(self.input_grid))
        limited = limited and not self.prefix_queries
        put("full", not limited and not (self.causal and self.prefix))
        put("may_be_empty", self.keys is not None)
        whole = self.queries is None and self.keys is None and not self.prefix
        unlimited = self.window is None and self.dilation == (1,)
        put("plain_causal", whole and self.causal and unlimited)
        put("key", _key(self))

    def _count(self, some: tuple[int, ...] | None, every: int | None = None) -> int:
        if some is not None:
            return len(some)
        return self.tokens if every is None else every

    def _limited(self, axis: int, size: int) -> bool:
        """Whether some pair is absent on this axis."""
        w = None if self.window is None else self.window[axis]
        near = w is not None and w < size - 1
        return size > 1 and (self.causal or self.dilation[axis] > 1 or near)

    # -- the table ---------------------------------------------------------------------------

    def _unbounded(self, axis: int) -> bool:
        window, buckets = self.window, self.buckets
        if buckets is not None and buckets[axis] is not None:
            return True
        w = None if window is None else window[axis]
        return w is not None and w * self.dilation[axis] <= self.grid[axis] - 1

    def _bucket_starts(self, axis: int) -> list[int]:
        """The smallest magnitude (in steps) of each class beside 0 on this axis."""
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
        p, n = self.prefix, self.tokens
        index = torch.full((n, n), -1, dtype=torch.int64, device=_CPU)
        grid = torch.zeros((), dtype=torch.int64, device=_CPU)
        present = torch.ones((), dtype=torch.bool, device=_CPU)
        axes = len(self.grid)
        for axis, count in enumerate(self.axis_classes):
            cls, here = self._axis_class(axis, _offsets(self.input_grid[axis]))
            shape = [1] * (2 * axes)
            shape[axis] = shape[axes + axis] = self.input_grid[axis]
            grid = grid * count + cls.view(shape)
            present = present & here.view(shape)
        if not self.prefix_queries:
            index[p:, p:] = grid.masked_fill(~present, -1).reshape(n - p, n - p)
        first = self.offset_classes
        each = torch.arange(p, device=_CPU)
        index[:p, :p] = first + torch.arange(p * p, device=_CPU).view(p, p)
        first += p * p
        if not self.causal:
            index[:p, p:] = first + each[:, None]
            first += p
        if not self.prefix_queries:
            index[p:, :p] = first + each
        rows = index[:p] if self.prefix_queries else index
        if self.queries is not None:
            rows = rows[list(self.queries)]
        return rows if self.keys is None else rows[:, list(self.keys)]

    def _axis_class(self, axis: int, offset: Tensor) -> tuple[Tensor, Tensor]:
        """The class of each offset on one axis, and whether the pair is there."""
        dilation = self.dilation[axis]
        starts = torch.tensor(self._bucket_starts(axis), dtype=torch.int64, device=_CPU)
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


def _offsets(size: int) -> Tensor:
    place = torch.arange(size, device=_CPU)
    return place[:, None] - place[None, :]


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


@functools.lru_cache(maxsize=64)
def _index(layout: Layout, device: torch.device) -> Tensor:
    return layout._build() if device.type == "cpu" else _index(layout, _CPU).to(device)


@functools.lru_cache(maxsize=64)
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
