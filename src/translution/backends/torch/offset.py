"""The plain torch backend: walk the classes, one matrix product over the rows of each.

Tokens are stored [tokens, batch, channels], so that the row of a pair is one contiguous block, and
scores [pairs, batch, heads] in the order of their classes. Only the rows of a few small classes, or
of a part of a large one, exist at a time; the backward pass computes them again. Classes of equally
many pairs are multiplied in one call: each core then has a matrix of its own, which is faster than
dividing a small one, and in half precision the call itself costs as much as a small product.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...caches import cached
from ...layouts import Layout
from ...operands import Operand

__all__ = ["mix", "mix_backward", "scores", "scores_backward"]

# Numbers (rows x channels) computed at once: enough that the steps around the matrix products cost
# little, few enough that they stay in the cache. Never fewer rows than the second, at which a
# matrix product runs at full rate.
NUMBERS = 98304
ROWS = 512
# Half precision multiplies more at once, its products being so fast that the calls count, and more
# classes in a call. Those are first copied side by side, which in full precision would not pay:
# there two are read in place.
HALF_TIMES = 4


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Segment(NamedTuple):
    """The rows of one class, or of several with equally many pairs, one after the other (or a part
    of one class): their matrices are multiplied in one call."""

    classes: tuple[int, ...]
    start: int
    stop: int
    first: bool  # whether the classes begin here
    last: bool  # whether they end here

    def each(self, rows: Tensor) -> Tensor:
        """[rows, channels] -> the same, or [classes, rows of each, channels]."""
        return rows if len(self.classes) == 1 else rows.unflatten(0, (len(self.classes), -1))


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
    """(classes of the same size; the first of their pairs), then ((), number of pairs)"""
    empty: tuple[int, ...]
    """classes without a pair"""


@cached
def _order(layout: Layout, device: torch.device) -> Order:
    pairs = layout.pairs_on(device)
    sizes = [stop - start for start, stop in itertools.pairwise(pairs.starts)]
    classes = sorted((c for c, size in enumerate(sizes) if size), key=sizes.__getitem__)
    runs, places, at = list[tuple[tuple[int, ...], int]](), list[Tensor](), 0
    for size, alike in itertools.groupby(classes, sizes.__getitem__):
        runs.append((tuple(alike), at))
        places += [torch.arange(pairs.starts[c], pairs.starts[c] + size) for c in runs[-1][0]]
        at += size * len(runs[-1][0])
    runs.append(((), at))
    order = torch.cat(places).to(device) if places else pairs.query.new_empty(0, dtype=torch.int64)
    query, key, flat = (t.index_select(0, order) for t in (pairs.query, pairs.key, pairs.flat))
    slot = torch.full_like(pairs.slot, at)  # absent pairs point one past the end
    slot[flat.long()] = torch.arange(at, device=device, dtype=slot.dtype)
    empty = tuple(cls for cls, size in enumerate(sizes) if not size)
    return Order(query, key, flat, slot, tuple(runs), empty)


def _groups(order: Order, x: Tensor) -> Iterator[Group]:
    """`x` [batch, tokens, channels] is one side."""
    batch, _, channels = x.shape
    if not batch:
        return
    half = x.dtype != wide(x.dtype)
    numbers = NUMBERS * (HALF_TIMES if half else 1)
    most = max(1, max(ROWS, numbers // max(channels, 1)) // batch)
    together = max(2, numbers // max(channels, 1) ** 2) if half else 2
    begin, segments = 0, list[Segment]()
    for classes, start, stop in _calls(order, most, together):
        if stop - begin > most and segments:
            yield Group(slice(begin, start), segments)
            begin, segments = start, []
        first = start
        while start < stop:  # more than one turn if a class is too large for one call
            end = stop if len(classes) > 1 else min(start + most, stop)
            rows = (start - begin) * batch, (end - begin) * batch
            segments.append(Segment(classes, *rows, start == first, end == stop))
            if end < stop:
                yield Group(slice(begin, end), segments)
                begin, segments = end, []
            start = end
    if segments:
        yield Group(slice(begin, order.runs[-1][1]), segments)


def _calls(order: Order, most: int, together: int) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Classes that are multiplied in one call, the first of their pairs, and one past the last."""
    for (classes, start), (_, stop) in itertools.pairwise(order.runs):
        size = (stop - start) // len(classes)
        # two may be up to twice too many: each core has one
        count = 1 if size > most else min(together, max(2, most // size))
        for i in range(0, len(classes), count):
            part = classes[i : i + count]
            yield part, start + i * size, start + (i + len(part)) * size


def _of(table: Tensor, classes: tuple[int, ...]) -> Tensor:
    """The entries of one class, or of two as a view [2, ...]."""
    if len(classes) == 1:
        return table[classes[0]]
    return table[classes[0] :: classes[1] - classes[0]][:2]


class Side:
    """An operand as this backend reads it.

    Attributes:
        x: tokens [tokens, batch, channels], so that the rows of a token are one block.
        weight, bias: the table, as in `Operand`.
        positions: int32 [pairs], the token of each pair on this side.
    """

    def __init__(self, operand: Operand, positions: Tensor):
        self.x = operand.x.transpose(0, 1).contiguous()
        self.weight, self.bias, self.positions = operand.weight, operand.bias, positions
        self.batch = self.x.shape[1]

    def read(self, table: Tensor, segment: Segment) -> Tensor:
        """The entries of a table, one or [classes, ...], in the dtype of the tokens."""
        dtype, classes = self.x.dtype, segment.classes
        if len(classes) == 1 or (len(classes) == 2 and table.dtype == dtype == wide(dtype)):
            return _of(table, classes).to(dtype)
        return torch.stack([table[c].to(dtype) for c in classes])

    def rows(self, group: Group) -> Tensor:
        """The tokens of these pairs: [rows, channels]."""
        return self.x.index_select(0, self.positions[group.pairs]).flatten(0, 1)

    def project(self, rows: Tensor, group: Group) -> Tensor:
        """What this side gives to the pairs: [rows, heads * head_dim]."""
        if self.weight is None:
            return rows
        out = rows.new_empty((rows.shape[0], self.weight.shape[-1]))
        parts = rows.split(group.sizes), out.split(group.sizes)
        for segment, part, into in zip(group.segments, *parts, strict=True):
            into = segment.each(into)
            torch.matmul(segment.each(part), self.read(self.weight, segment), out=into)
            if self.bias is not None:
                into += self.read(self.bias, segment).unsqueeze(-2)
        return out


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
        side, sizes = self.side, group.sizes
        parts = zip(rows.split(sizes), grad.split(sizes), strict=True)
        for segment, (tokens, part) in zip(group.segments, parts, strict=True):
            tokens, part = segment.each(tokens), segment.each(part)
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
                pieces = grad.split(sizes), back.split(sizes)
                for segment, part, into in zip(group.segments, *pieces, strict=True):
                    matrix = side.read(side.weight, segment).mT
                    torch.matmul(segment.each(part), matrix, out=segment.each(into))
                grad = back
            _add(self.x, side.positions[group.pairs], grad)

    def _sum(self, name: str, whole: Tensor, segment: Segment, part: Tensor) -> None:
        """Write the sum of each class; that of a class in parts stays wide until its last."""
        if not segment.first:
            part = self.carry.pop(name).add_(part)
        if not segment.last:
            self.carry[name] = part.to(self.sums)
            return
        each = part.unbind() if len(segment.classes) > 1 else (part,)
        for cls, one in zip(segment.classes, each, strict=True):
            whole[cls].copy_(one)

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


def _cut(*whole: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """[pairs, ...] tensors, in parts of which the first is small enough to be kept wide. (Twice the
    numbers: so many has a group at the most, in full precision.)"""
    pairs = max(1, 2 * NUMBERS // max(whole[0][:1].numel(), 1))
    return zip(*(t.split(pairs) for t in whole), strict=True)


def _dot(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write the products of rows per head to `out` [pairs, batch, heads]; `left` is used up."""
    shape = *out.shape, left.shape[-1] // out.shape[-1]
    for part, other, into in _cut(left.view(shape), right.view(shape), out):
        torch.sum(part.to(out.dtype).mul_(other), -1, out=into)


def _scale(rows: Tensor, by: Tensor) -> Tensor:
    """Rows times a number per head [pairs, batch, heads], in place: nothing reads them again, as
    they are projections, or tokens of a side without a table, whose gradients need no tokens."""
    shape = *by.shape, rows.shape[-1] // by.shape[-1]
    for part, number in _cut(rows.view(shape), by.unsqueeze(-1)):
        part *= number
    return rows


def _add(total: Tensor, places: Tensor, rows: Tensor, by: Tensor | None = None) -> None:
    """Add rows, times a number per head (in place), to their places in `total` [tokens, ...]."""
    rows, numbers = rows.view(-1, *total.shape[1:]), () if by is None else (by,)
    for part, to, *number in _cut(rows, places, *numbers):
        part = part.to(total.dtype)
        total.index_add_(0, to, _scale(part, *number) if number else part)


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


def scores(query: Operand, key: Operand, heads: int, scale: float, layout: Layout) -> Tensor:
    """The scores of all pairs, [batch, heads, queries, keys]; -inf where a pair is absent."""
    x = query.x
    pairs = _order(layout, x.device)
    q, k = Side(query, pairs.query), Side(key, pairs.key)
    out = x.new_empty((len(pairs.flat) + 1, q.batch, heads), dtype=wide(x.dtype))
    for group in _groups(pairs, x):
        # The projections are not bound to names: they are freed before the next group.
        _dot(q.project(q.rows(group), group), k.project(k.rows(group), group), out[group.pairs])
    if scale != 1.0:
        out *= scale
    out[-1] = float("-inf")
    return _unsort(out, pairs, layout)


def scores_backward(
    grad: Tensor, query: Operand, key: Operand, heads: int, scale: float, layout: Layout,
    wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of both operands, in the order x, x, weight, weight, bias, bias.

    `wanted` says which of the six are needed; an empty tensor stands for each of the others.
    """
    pairs = _order(layout, query.x.device)
    q, k = Side(query, pairs.query), Side(key, pairs.key)
    grad_q = SideGrad(q, wanted[0], wanted[2], wanted[4])
    grad_k = SideGrad(k, wanted[1], wanted[3], wanted[5])
    grad = _sort(grad, pairs)
    if scale != 1.0:
        grad = grad * scale
    for group in _groups(pairs, query.x):
        q_rows, k_rows = q.rows(group), k.rows(group)
        ds = grad[group.pairs]
        if grad_q.wanted:
            grad_q.add(group, q_rows, _scale(k.project(k_rows, group), ds))
        if grad_k.wanted:
            grad_k.add(group, k_rows, _scale(q.project(q_rows, group), ds))
    dxq, dwq, dbq = grad_q.finish(pairs)
    dxk, dwk, dbk = grad_k.finish(pairs)
    return dxq, dxk, dwq, dwk, dbq, dbk


def mix(a: Tensor, value: Operand, layout: Layout) -> Tensor:
    """The values, projected and summed with the weights a, [batch, queries, heads · head_dim]."""
    x = value.x
    pairs = _order(layout, x.device)
    v = Side(value, pairs.key)
    weights = _sort(a, pairs)
    out = x.new_zeros((layout.n_queries, v.batch, value.inner), dtype=wide(x.dtype))
    for group in _groups(pairs, x):
        _add(
            out,
            pairs.query[group.pairs],
            v.project(v.rows(group), group),
            weights[group.pairs],
        )
    return out.transpose(0, 1).to(x.dtype).contiguous()


def mix_backward(
    grad: Tensor, a: Tensor, value: Operand, layout: Layout, wanted: list[bool]
) -> tuple[Tensor, ...]:
    """The gradients of a, x, weight and bias.

    `wanted` says which of the four are needed; an empty tensor stands for each of the others.
    """
    x = value.x
    pairs = _order(layout, x.device)
    v = Side(value, pairs.key)
    weights = _sort(a, pairs)
    outer = Side(Operand(grad), pairs.query)
    shape = len(weights) + 1, *weights.shape[1:]
    da = weights.new_zeros(shape, dtype=wide(x.dtype)) if wanted[0] else None
    grad_v = SideGrad(v, *wanted[1:])
    for group in _groups(pairs, x):
        rows = v.rows(group)
        dy = outer.rows(group)
        if da is not None:
            _dot(v.project(rows, group), dy, da[group.pairs])
        if grad_v.wanted:
            grad_v.add(group, rows, _scale(dy, weights[group.pairs]))
    da = x.new_empty(0) if da is None else _unsort(da, pairs, layout).to(a.dtype)
    return da, *grad_v.finish(pairs)
