"""The plain torch backend: walk the classes, one matrix product over the rows of each.

Tokens are stored [tokens, batch, channels], so that the row of a pair is one contiguous block, and
scores [pairs, batch, heads] in the order of their classes. Only the rows of a few small classes, or
of a part of a large one, exist at a time; the backward pass computes them again. Two classes of
equally many pairs are multiplied in one call: each core then has a matrix of its own, which is
faster than dividing a small one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..layouts import Layout

__all__ = ["mix", "mix_backward", "scores", "scores_backward", "unavailable"]

# Numbers per operand (rows x channels) computed at once: enough that the steps around the matrix
# products cost little, few enough that the operands stay in the cache. Never fewer rows than the
# second, at which a matrix product runs at full rate.
NUMBERS = 98304
ROWS = 512


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"it computes in floating point, not {dtype}"


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Segment(NamedTuple):
    """The rows of one class, or of two with equally many pairs, one after the other (or a part of
    one class): their matrices are multiplied in one call."""

    classes: tuple[int, ...]
    start: int
    stop: int
    first: bool  # whether the classes begin here


class Group(NamedTuple):
    """Pairs computed at once: small classes together, large ones in parts."""

    pairs: slice
    segments: list[Segment]

    @property
    def sizes(self) -> list[int]:
        """Rows per segment."""
        return [segment.stop - segment.start for segment in self.segments]


class Order(NamedTuple):
    """The pairs by class as in `Pairs`, but classes with equally many pairs stand together."""

    query: Tensor
    key: Tensor
    flat: Tensor
    slot: Tensor
    runs: tuple[tuple[tuple[int, ...], int], ...]
    """(one class, or two of the same size; the first of their pairs), then ((), number of pairs)"""
    empty: tuple[int, ...]
    """classes without a pair"""


@functools.lru_cache(maxsize=64)
def _order(layout: Layout, device: torch.device) -> Order:
    pairs = layout.pairs_on(device)
    sizes = [stop - start for start, stop in itertools.pairwise(pairs.starts)]
    classes = sorted((c for c, size in enumerate(sizes) if size), key=sizes.__getitem__)
    runs, at, i = list[tuple[tuple[int, ...], int]](), 0, 0
    places = list[Tensor]()
    while i < len(classes):
        two = i + 1 < len(classes) and sizes[classes[i]] == sizes[classes[i + 1]]
        run = tuple(classes[i : i + 1 + two])
        runs.append((run, at))
        for cls in run:
            places.append(torch.arange(pairs.starts[cls], pairs.starts[cls + 1]))
            at += sizes[cls]
        i += len(run)
    runs.append(((), at))
    kept = torch.cat(places).to(device) if places else pairs.query.new_empty(0, dtype=torch.int64)
    query, key, flat = (t.index_select(0, kept) for t in (pairs.query, pairs.key, pairs.flat))
    slot = torch.full_like(pairs.slot, at)  # absent pairs point one past the end
    slot[flat.long()] = torch.arange(at, device=device, dtype=slot.dtype)
    empty = tuple(cls for cls, size in enumerate(sizes) if not size)
    return Order(query, key, flat, slot, tuple(runs), empty)


def _groups(order: Order, batch: int, channels: int) -> Iterator[Group]:
    if not batch:
        return
    most = max(1, max(ROWS, NUMBERS // max(channels, 1)) // batch)
    begin, segments = 0, list[Segment]()
    for (classes, start), (_, stop) in itertools.pairwise(order.runs):
        if stop - begin > most and segments:
            yield Group(slice(begin, start), segments)
            begin, segments = start, []
        each = (stop - start) // len(classes)
        if each <= most:
            rows = (start - begin) * batch, (stop - begin) * batch
            segments.append(Segment(classes, *rows, True))
            continue
        for i, cls in enumerate(classes):  # too many for one call: a class at a time, in parts
            first = start + i * each
            for at in range(first, first + each, most):
                end = min(at + most, first + each)
                rows = (at - begin) * batch, (end - begin) * batch
                segments.append(Segment((cls,), *rows, at == first))
                if end < stop:
                    yield Group(slice(begin, end), segments)
                    begin, segments = end, []
    if segments:
        yield Group(slice(begin, order.runs[-1][1]), segments)


def _of(table: Tensor, classes: tuple[int, ...]) -> Tensor:
    """The entries of one class, or of two as a view [2, ...]."""
    if len(classes) == 1:
        return table[classes[0]]
    first, second = classes
    return table[first :: second - first][:2]


class Side:
    """One side of the pairs (query, key or value): its token rows and, if relative, its table."""

    def __init__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, places: Tensor):
        self.x = x.transpose(0, 1).contiguous()
        self.weight, self.bias, self.places = weight, bias, places
        self.batch = self.x.shape[1]

    def matrix(self, segment: Segment) -> Tensor:
        """[channels, inner], or two of them, in the dtype of the tokens (a table may be wider)."""
        assert self.weight is not None
        return _of(self.weight, segment.classes).to(self.x.dtype)

    def rows(self, group: Group) -> Tensor:
        """The tokens of these pairs: [rows, channels]."""
        return self.x.index_select(0, self.places[group.pairs]).flatten(0, 1)

    def project(self, rows: Tensor, group: Group) -> Tensor:
        """What this side gives to the pairs: [rows, heads * head_dim]."""
        if self.weight is None:
            return rows
        out = rows.new_empty((rows.shape[0], self.weight.shape[-1]))
        sizes = group.sizes
        for segment, part, into in zip(
            group.segments, rows.split(sizes), out.split(sizes), strict=True
        ):
            part, into = _each(part, segment), _each(into, segment)
            torch.matmul(part, self.matrix(segment), out=into)
            if self.bias is not None:
                into += _of(self.bias, segment.classes).to(rows.dtype).unsqueeze(-2)
        return out


def _each(rows: Tensor, segment: Segment) -> Tensor:
    """[rows, channels] -> the same, or [2, rows of each class, channels]."""
    return rows.unflatten(0, (2, -1)) if len(segment.classes) == 2 else rows


class SideGrad:
    """The gradients of a `Side`. Each is summed wide, and narrowed at the end."""

    def __init__(self, side: Side, x: bool, weight: bool, bias: bool):
        self.side = side
        self.sums = wide(side.x.dtype)
        self.x = torch.zeros_like(side.x, dtype=self.sums) if x else None
        self.weight = _like(side.weight) if weight else None
        self.bias = _like(side.bias) if bias else None
        self.carry: dict[str, Tensor] = {}

    @property
    def wanted(self) -> bool:
        return not (self.x is None and self.weight is None and self.bias is None)

    def add(self, group: Group, rows: Tensor, grad: Tensor) -> None:
        """`grad` [rows, heads * head_dim] is that of what `Side.project(rows)` gave."""
        side = self.side
        sizes = group.sizes
        parts = zip(rows.split(sizes), grad.split(sizes), strict=True)
        for segment, (tokens, part) in zip(group.segments, parts, strict=True):
            tokens, part = _each(tokens, segment), _each(part, segment)
            if self.weight is not None:
                if self.weight.dtype == grad.dtype == self.sums:
                    # beta = 0 overwrites, so a table's gradient is written once, never cleared
                    into = _of(self.weight, segment.classes)
                    add = into.baddbmm_ if part.ndim == 3 else into.addmm_
                    add(tokens.mT, part, beta=0 if segment.first else 1)
                else:
                    self._sum("weight", self.weight, segment, tokens.mT @ part)
            if self.bias is not None:
                self._sum("bias", self.bias, segment, part.sum(-2, dtype=self.sums))
        if self.x is not None:
            if side.weight is not None:
                back = grad.new_empty((grad.shape[0], side.x.shape[-1]))
                for segment, part, into in zip(
                    group.segments, grad.split(sizes), back.split(sizes), strict=True
                ):
                    matrix = side.matrix(segment).mT
                    torch.matmul(_each(part, segment), matrix, out=_each(into, segment))
                grad = back
            grad = grad.view(-1, *side.x.shape[1:]).to(self.sums)
            self.x.index_add_(0, side.places[group.pairs], grad)

    def _sum(self, name: str, whole: Tensor, segment: Segment, part: Tensor) -> None:
        """Add to the sum of a class (or two), which stays wide while the class lasts."""
        part = part.to(self.sums)
        self.carry[name] = part if segment.first else self.carry[name] + part
        _of(whole, segment.classes).copy_(self.carry[name])

    def finish(self, order: Order) -> tuple[Tensor, ...]:
        """The gradients of x, weight, bias; those of a class without pairs are zero."""
        for whole in (self.weight, self.bias):
            if whole is not None:
                if self.side.batch:
                    whole[list(order.empty)] = 0
                else:
                    whole.zero_()
        x = None if self.x is None else self.x.transpose(0, 1).to(self.side.x.dtype).contiguous()
        # operators return tensors, so an unwanted one is empty (and each a tensor of its own)
        return tuple(
            self.side.x.new_empty(0) if grad is None else grad
            for grad in (x, self.weight, self.bias)
        )


def _like(table: Tensor | None) -> Tensor | None:
    """Room for a table's gradient: contiguous, and not yet written."""
    return None if table is None else torch.empty_like(table, memory_format=torch.contiguous_format)


def _sort(dense: Tensor, pairs: Order) -> Tensor:
    """[batch, heads, queries, keys] -> [pairs, batch, heads] in the order of the classes."""
    batch, heads = dense.shape[:2]
    cells = dense.reshape(batch * heads, dense.shape[2] * dense.shape[3]).t().contiguous()
    return cells.index_select(0, pairs.flat).view(len(pairs.flat), batch, heads)


def _unsort(sorted_: Tensor, pairs: Order, layout: Layout) -> Tensor:
    """[pairs + 1, batch, heads], the last for the absent -> [batch, heads, queries, keys]."""
    _, batch, heads = sorted_.shape
    cells = sorted_.flatten(1).index_select(0, pairs.slot)
    return cells.t().contiguous().view(batch, heads, layout.n_queries, layout.n_keys)


def scores(
    xq: Tensor,
    xk: Tensor,
    wq: Tensor | None,
    wk: Tensor | None,
    bq: Tensor | None,
    bk: Tensor | None,
    heads: int,
    scale: float,
    layout: Layout,
) -> Tensor:
    pairs = _order(layout, xq.device)
    query, key = Side(xq, wq, bq, pairs.query), Side(xk, wk, bk, pairs.key)
    out = xq.new_empty((len(pairs.flat) + 1, query.batch, heads), dtype=wide(xq.dtype))
    out[-1] = float("-inf")
    for group in _groups(pairs, query.batch, xq.shape[-1]):
        q = query.project(query.rows(group), group).to(out.dtype)
        k = key.project(key.rows(group), group).to(out.dtype)
        part = out[group.pairs].view(-1, heads)
        torch.sum((q * k).unflatten(-1, (heads, -1)), -1, out=part)
    if scale != 1.0:
        out *= scale
    return _unsort(out, pairs, layout)


def scores_backward(
    grad: Tensor,
    xq: Tensor,
    xk: Tensor,
    wq: Tensor | None,
    wk: Tensor | None,
    bq: Tensor | None,
    bk: Tensor | None,
    heads: int,
    scale: float,
    layout: Layout,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    pairs = _order(layout, xq.device)
    query, key = Side(xq, wq, bq, pairs.query), Side(xk, wk, bk, pairs.key)
    grad_query = SideGrad(query, wanted[0], wanted[2], wanted[4])
    grad_key = SideGrad(key, wanted[1], wanted[3], wanted[5])
    grad = _sort(grad, pairs)
    if scale != 1.0:
        grad = grad * scale
    for group in _groups(pairs, query.batch, xq.shape[-1]):
        xq_rows, xk_rows = query.rows(group), key.rows(group)
        ds = grad[group.pairs].view(-1, heads, 1)
        if grad_query.wanted:
            k = key.project(xk_rows, group).unflatten(-1, (heads, -1))
            grad_query.add(group, xq_rows, (k * ds).flatten(1).to(xq.dtype))
        if grad_key.wanted:
            q = query.project(xq_rows, group).unflatten(-1, (heads, -1))
            grad_key.add(group, xk_rows, (q * ds).flatten(1).to(xk.dtype))
    dxq, dwq, dbq = grad_query.finish(pairs)
    dxk, dwk, dbk = grad_key.finish(pairs)
    return dxq, dxk, dwq, dwk, dbq, dbk


def mix(a: Tensor, x: Tensor, w: Tensor, b: Tensor | None, layout: Layout) -> Tensor:
    pairs = _order(layout, x.device)
    value = Side(x, w, b, pairs.key)
    heads, inner = a.shape[1], w.shape[-1]
    weights = _sort(a, pairs)
    out = x.new_zeros((layout.n_queries, value.batch, inner), dtype=wide(x.dtype))
    for group in _groups(pairs, value.batch, x.shape[-1]):
        v = value.project(value.rows(group), group).to(out.dtype).unflatten(-1, (heads, -1))
        v *= weights[group.pairs].view(-1, heads, 1)
        out.index_add_(0, pairs.query[group.pairs], v.view(-1, value.batch, inner))
    return out.transpose(0, 1).to(x.dtype).contiguous()


def mix_backward(
    grad: Tensor,
    a: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    layout: Layout,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    pairs = _order(layout, x.device)
    value = Side(x, w, b, pairs.key)
    heads = a.shape[1]
    sums = wide(x.dtype)
    weights = _sort(a, pairs)
    outer = Side(grad, None, None, pairs.query)
    da = (
        weights.new_zeros((len(weights) + 1, *weights.shape[1:]), dtype=sums) if wanted[0] else None
    )
    grad_value = SideGrad(value, *wanted[1:])
    for group in _groups(pairs, value.batch, x.shape[-1]):
        rows = value.rows(group)
        dy = outer.rows(group).unflatten(-1, (heads, -1))
        if da is not None:
            v = value.project(rows, group).view_as(dy).to(sums)
            torch.sum(v * dy, -1, out=da[group.pairs].view(-1, heads))
        if grad_value.wanted:
            dv = dy * weights[group.pairs].view(-1, heads, 1)
            grad_value.add(group, rows, dv.flatten(1).to(x.dtype))
    dx, dw, db = grad_value.finish(pairs)
    if da is None:
        return x.new_empty(0), dx, dw, db
    return _unsort(da, pairs, layout).to(a.dtype), dx, dw, db
