"""The plain torch backend: walk the classes, one matrix product over the rows of each.

Tokens are stored [tokens, batch, channels], so that the row of a pair is one contiguous block, and
scores [pairs, batch, heads] in the order of their classes. Only the rows of one class (or a chunk
of it) exist at a time; the backward pass computes them again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..layouts import Layout, Pairs

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
    """The rows of one class (or a part of it) in a group."""

    cls: int
    start: int
    stop: int
    first: bool  # whether the class begins here


class Group(NamedTuple):
    """Pairs computed at once: small classes together, large ones in parts."""

    pairs: slice
    segments: list[Segment]

    @property
    def sizes(self) -> list[int]:
        """Rows per segment."""
        return [segment.stop - segment.start for segment in self.segments]


def _groups(pairs: Pairs, batch: int, channels: int) -> Iterator[Group]:
    if not batch:
        return
    most = max(1, max(ROWS, NUMBERS // max(channels, 1)) // batch)
    begin, segments = 0, list[Segment]()
    for cls, (start, stop) in enumerate(itertools.pairwise(pairs.starts)):
        if stop - begin > most and segments:
            yield Group(slice(begin, start), segments)
            begin, segments = start, []
        for at in range(start, stop, most):
            end = min(at + most, stop)
            rows = (at - begin) * batch, (end - begin) * batch
            segments.append(Segment(cls, *rows, at == start))
            if end < stop:
                yield Group(slice(begin, end), segments)
                begin, segments = end, []
    if segments:
        yield Group(slice(begin, pairs.starts[-1]), segments)


class Side:
    """One side of the pairs (query, key or value): its token rows and, if relative, its table."""

    def __init__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, places: Tensor):
        self.x = x.transpose(0, 1).contiguous()
        self.weight, self.bias, self.places = weight, bias, places
        self.batch = self.x.shape[1]
        self._matrices = None if weight is None else weight.unbind(0)

    def matrices(self, group: Group) -> list[Tensor]:
        """The classes' matrices in the dtype of the tokens (a table may be kept wider)."""
        assert self._matrices is not None
        found = [self._matrices[segment.cls] for segment in group.segments]
        if found[0].dtype == self.x.dtype:
            return found
        return [matrix.to(self.x.dtype) for matrix in found]

    def rows(self, group: Group) -> Tensor:
        """The tokens of these pairs: [rows, channels]."""
        return self.x.index_select(0, self.places[group.pairs]).flatten(0, 1)

    def project(self, rows: Tensor, group: Group) -> Tensor:
        """What this side gives to the pairs: [rows, heads * head_dim]."""
        if self.weight is None:
            return rows
        out = rows.new_empty((rows.shape[0], self.weight.shape[-1]))
        sizes = group.sizes
        parts = zip(rows.split(sizes), self.matrices(group), out.split(sizes), strict=True)
        for segment, (part, matrix, into) in zip(group.segments, parts, strict=True):
            if self.bias is None:
                torch.mm(part, matrix, out=into)
            else:
                torch.addmm(self.bias[segment.cls].to(rows.dtype), part, matrix, out=into)
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
        side = self.side
        sizes = group.sizes
        parts = zip(rows.split(sizes), grad.split(sizes), strict=True)
        for segment, (tokens, part) in zip(group.segments, parts, strict=True):
            if self.weight is not None:
                if self.weight.dtype == grad.dtype == self.sums:
                    # beta = 0 overwrites, so a table's gradient is written once, never cleared
                    into = self.weight[segment.cls]
                    into.addmm_(tokens.t(), part, beta=0 if segment.first else 1)
                else:
                    self._sum("weight", self.weight, segment, tokens.t() @ part)
            if self.bias is not None:
                self._sum("bias", self.bias, segment, part.sum(0, dtype=self.sums))
        if self.x is not None:
            if side.weight is not None:
                back = grad.new_empty((grad.shape[0], side.x.shape[-1]))
                intos = back.split(sizes)
                for part, matrix, into in zip(
                    grad.split(sizes), side.matrices(group), intos, strict=True
                ):
                    torch.mm(part, matrix.t(), out=into)
                grad = back
            grad = grad.view(-1, *side.x.shape[1:]).to(self.sums)
            self.x.index_add_(0, side.places[group.pairs], grad)

    def _sum(self, name: str, whole: Tensor, segment: Segment, part: Tensor) -> None:
        """Add to a class's sum, which stays wide while the class lasts."""
        part = part.to(self.sums)
        self.carry[name] = part if segment.first else self.carry[name] + part
        whole[segment.cls] = self.carry[name]

    def finish(self, pairs: Pairs) -> tuple[Tensor, ...]:
        """The gradients of x, weight, bias; those of a class without pairs are zero."""
        for cls, (start, stop) in enumerate(itertools.pairwise(pairs.starts)):
            if start == stop or not self.side.batch:
                for whole in (self.weight, self.bias):
                    if whole is not None:
                        whole[cls] = 0
        x = None if self.x is None else self.x.transpose(0, 1).to(self.side.x.dtype).contiguous()
        # operators return tensors, so an unwanted one is empty (and each a tensor of its own)
        return tuple(
            self.side.x.new_empty(0) if grad is None else grad
            for grad in (x, self.weight, self.bias)
        )


def _like(table: Tensor | None) -> Tensor | None:
    """Room for a table's gradient: contiguous, and not yet written."""
    return None if table is None else torch.empty_like(table, memory_format=torch.contiguous_format)


def _sort(dense: Tensor, pairs: Pairs) -> Tensor:
    """[batch, heads, queries, keys] -> [pairs, batch, heads] in the order of the classes."""
    batch, heads = dense.shape[:2]
    cells = dense.reshape(batch * heads, dense.shape[2] * dense.shape[3]).t().contiguous()
    return cells.index_select(0, pairs.flat).view(len(pairs.flat), batch, heads)


def _unsort(sorted_: Tensor, pairs: Pairs, layout: Layout) -> Tensor:
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
    pairs = layout.pairs_on(xq.device)
    query, key = Side(xq, wq, bq, pairs.query), Side(xk, wk, bk, pairs.key)
    out = xq.new_empty((pairs.starts[-1] + 1, query.batch, heads), dtype=wide(xq.dtype))
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
    pairs = layout.pairs_on(xq.device)
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
    pairs = layout.pairs_on(x.device)
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
    pairs = layout.pairs_on(x.device)
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
