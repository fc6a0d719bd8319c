"""The plain torch backend: walk the classes, one matrix product over the rows of each.

Tokens are stored [tokens, batch, channels], so that the row of a pair is one contiguous block, and
scores [pairs, batch, heads] in the order of their classes. Only the rows of one class (or a chunk
of it) exist at a time; the backward pass computes them again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..layouts import Layout, Pairs

__all__ = ["mix", "mix_backward", "scores", "scores_backward", "unavailable"]

# Rows (pairs x batch) computed at once: enough for a matrix product to run at full rate, few
# enough for its operands to stay in a core's cache.
ROWS = 2048


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"it computes in floating point, not {dtype}"


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Side:
    """One side of the pairs (query, key or value): its token rows and, if relative, its table."""

    def __init__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, places: Tensor):
        self.x = x.transpose(0, 1).contiguous()
        self.weight, self.bias, self.places = weight, bias, places
        self.batch = self.x.shape[1]
        self.table: Tensor | None = None
        self.offset: Tensor | None = None

    def enter(self, cls: int) -> None:
        """Take this class's matrix, in the dtype of the tokens (a table may be kept wider)."""
        if self.weight is not None:
            self.table = self.weight[cls].to(self.x.dtype)
        if self.bias is not None:
            self.offset = self.bias[cls].to(self.x.dtype)

    def rows(self, chunk: slice) -> Tensor:
        """The tokens of these pairs: [rows, channels]."""
        return self.x.index_select(0, self.places[chunk]).flatten(0, 1)

    def project(self, rows: Tensor) -> Tensor:
        """What this side gives to the pairs: [rows, heads * head_dim]."""
        if self.table is None:
            return rows
        if self.offset is None:
            return rows @ self.table
        return torch.addmm(self.offset, rows, self.table)


class SideGrad:
    """The gradients of a `Side`. Each is summed wide, and narrowed once at the end."""

    def __init__(self, side: Side, x: bool, weight: bool, bias: bool):
        self.side = side
        self.sums = wide(side.x.dtype)
        self.x = torch.zeros_like(side.x, dtype=self.sums) if x else None
        self.weight = _like(side.weight) if weight else None
        self.bias = _like(side.bias) if bias else None
        self.fresh = True

    @property
    def wanted(self) -> bool:
        return not (self.x is None and self.weight is None and self.bias is None)

    def enter(self, cls: int) -> None:
        """Keep the sums of the class before, and begin this one's."""
        self.leave()
        self.cls = cls
        self.weight_sum = self._sum(self.weight)
        self.bias_sum = self._sum(self.bias)
        self.fresh = True

    def _sum(self, whole: Tensor | None) -> Tensor | None:
        if whole is None:
            return None
        mine = whole[self.cls]
        return mine if mine.dtype == self.sums else torch.empty_like(mine, dtype=self.sums)

    def leave(self) -> None:
        if self.fresh:
            return
        for whole, mine in ((self.weight, self.weight_sum), (self.bias, self.bias_sum)):
            if whole is not None and mine is not None and whole.dtype != self.sums:
                whole[self.cls] = mine

    def add(self, chunk: slice, rows: Tensor, grad: Tensor) -> None:
        """`grad` [rows, heads * head_dim] is that of what `Side.project(rows)` gave."""
        side = self.side
        if self.weight_sum is not None:
            if grad.dtype == self.sums:
                # beta = 0 overwrites, so the memory of a table's gradient is written only once
                self.weight_sum.addmm_(rows.t(), grad, beta=0 if self.fresh else 1)
            elif self.fresh:
                self.weight_sum.copy_(rows.t() @ grad)
            else:
                self.weight_sum += rows.t() @ grad
        if self.bias_sum is not None:
            part = grad.sum(0, dtype=self.sums)
            self.bias_sum.copy_(part if self.fresh else self.bias_sum + part)
        self.fresh = False
        if self.x is not None:
            if side.table is not None:
                grad = grad @ side.table.t()
            grad = grad.view(-1, side.batch, side.x.shape[-1]).to(self.sums)
            self.x.index_add_(0, side.places[chunk], grad)

    def finish(self, starts: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The gradients of x, weight, bias; empty where none was wanted."""
        self.leave()
        for cls in range(len(starts) - 1):
            if starts[cls] == starts[cls + 1] or not self.side.batch:
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
    return (
        None if table is None else torch.empty(table.shape, dtype=table.dtype, device=table.device)
    )


def _chunks(pairs: Pairs, batch: int) -> Iterator[tuple[int, slice, bool]]:
    """(class, its pairs or a part of them, whether the class begins)."""
    if not batch:
        return
    step = max(1, ROWS // batch)
    for cls, (start, stop) in enumerate(zip(pairs.starts, pairs.starts[1:], strict=False)):
        for at in range(start, stop, step):
            yield cls, slice(at, min(at + step, stop)), at == start


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
    for cls, chunk, begins in _chunks(pairs, query.batch):
        if begins:
            query.enter(cls)
            key.enter(cls)
        q = query.project(query.rows(chunk)).to(out.dtype)
        k = key.project(key.rows(chunk)).to(out.dtype)
        part = out[chunk].view(-1, heads)
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
    for cls, chunk, begins in _chunks(pairs, query.batch):
        if begins:
            query.enter(cls)
            key.enter(cls)
            grad_query.enter(cls)
            grad_key.enter(cls)
        xq_rows, xk_rows = query.rows(chunk), key.rows(chunk)
        ds = grad[chunk].view(-1, heads, 1)
        if grad_query.wanted:
            k = key.project(xk_rows).unflatten(-1, (heads, -1))
            grad_query.add(chunk, xq_rows, (k * ds).flatten(1).to(xq.dtype))
        if grad_key.wanted:
            q = query.project(xq_rows).unflatten(-1, (heads, -1))
            grad_key.add(chunk, xk_rows, (q * ds).flatten(1).to(xk.dtype))
    dxq, dwq, dbq = grad_query.finish(pairs.starts)
    dxk, dwk, dbk = grad_key.finish(pairs.starts)
    return dxq, dxk, dwq, dwk, dbq, dbk


def mix(a: Tensor, x: Tensor, w: Tensor, b: Tensor | None, layout: Layout) -> Tensor:
    pairs = layout.pairs_on(x.device)
    value = Side(x, w, b, pairs.key)
    heads, inner = a.shape[1], w.shape[-1]
    weights = _sort(a, pairs)
    out = x.new_zeros((layout.n_queries, value.batch, inner), dtype=wide(x.dtype))
    for cls, chunk, begins in _chunks(pairs, value.batch):
        if begins:
            value.enter(cls)
        v = value.project(value.rows(chunk)).to(out.dtype).unflatten(-1, (heads, -1))
        v *= weights[chunk].view(-1, heads, 1)
        out.index_add_(0, pairs.query[chunk], v.view(-1, value.batch, inner))
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
    for cls, chunk, begins in _chunks(pairs, value.batch):
        if begins:
            value.enter(cls)
            grad_value.enter(cls)
        rows = value.rows(chunk)
        dy = outer.rows(chunk).unflatten(-1, (heads, -1))
        if da is not None:
            v = value.project(rows).view_as(dy).to(sums)
            torch.sum(v * dy, -1, out=da[chunk].view(-1, heads))
        if grad_value.wanted:
            dv = dy * weights[chunk].view(-1, heads, 1)
            grad_value.add(chunk, rows, dv.flatten(1).to(x.dtype))
    dx, dw, db = grad_value.finish(pairs.starts)
    if da is None:
        return x.new_empty(0), dx, dw, db
    return _unsort(da, pairs, layout).to(a.dtype), dx, dw, db
