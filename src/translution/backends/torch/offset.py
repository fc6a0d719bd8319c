"""The two primitives of Translution in plain torch, forward and backward.

    scores   s[i, j] = scale · q · k       q = x_i Wq[c] + bq[c],   k = x_j Wk[c] + bk[c]
    mix      y[i]    = Σ_j a[i, j] · v     v = x_j Wv[c] + bv[c]

Both are per head, for each pair (query i, key j) of class c. With r = x W[c] + b[c] as the
projected row of a pair on one side (q, k or v), the gradients are

    scores   dq = scale · ds · k,   dk = scale · ds · q
    mix      dv = a · dy,           da = dy · v
    all      dx_i = Σ over the pairs of token i of dr W[c]ᵀ
             dW[c] = Σ over the pairs of class c of xᵀ dr,   db[c] = Σ over them of dr

so both directions consist of three steps per class: gather the tokens of its pairs, multiply them
by one matrix, and reduce the result (to scores, or by adding it to tokens or tables). Projected
rows for all pairs would take B · P · H · D numbers. Here only the rows of one *group* of classes
exist at a time, and the backward pass computes them again.

Shapes are written with

    B batch   N queries   M keys   P pairs   K classes   C channels   H heads   D head_dim

and "rows" are (pair, sample) combinations, with the sample as the fast axis. Tokens are stored
[N, B, C], so that gathering a pair copies one contiguous block of B rows. Scores are stored
[P, B, H] in the order of the classes, so that those of a group are a slice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...layouts import Layout
from ...operands import Operand
from .groups import ELEMENTS, Gradients, Group, Order, Segment, groups, order_of, sum_dtype

__all__ = ["mix", "mix_backward", "scores", "scores_backward", "sum_dtype"]


def _entries(table: Tensor, classes: tuple[int, ...]) -> Tensor:
    """The entries of one class [...], or of two [2, ...], of a table [K, ...], as a view.

    Any two entries are equally spaced, so a strided view contains them, and nothing is copied.
    """
    if len(classes) == 1:
        return table[classes[0]]
    return table[classes[0] :: classes[1] - classes[0]][:2]


class Side:
    """One operand of a primitive, with the token that each pair reads from it.

    Attributes:
        x: tokens [N or M, B, C], so that the rows of a token are one block.
        weight, bias: the table, as in `Operand`.
        positions: int32 [P], the token of each pair on this side.
        batch: B.
    """

    def __init__(self, operand: Operand, positions: Tensor):
        self.x = operand.x.transpose(0, 1).contiguous()
        self.weight, self.bias, self.positions = operand.weight, operand.bias, positions
        self.batch = self.x.shape[1]

    def entries(self, table: Tensor, segment: Segment) -> Tensor:
        """The entries [...] or [classes, ...] of a table for a segment, in the tokens' dtype."""
        dtype, classes = self.x.dtype, segment.classes
        in_place = len(classes) == 2 and table.dtype == dtype == sum_dtype(dtype)
        if len(classes) == 1 or in_place:
            return _entries(table, classes).to(dtype)
        return torch.stack([table[c].to(dtype) for c in classes])

    def gather(self, group: Group) -> Tensor:
        """The tokens of the pairs of a group, [rows, C]."""
        return self.x.index_select(0, self.positions[group.pairs]).flatten(0, 1)

    def project(self, rows: Tensor, group: Group) -> Tensor:
        """Project the tokens of a group, [rows, C] -> [rows, H · D]: x W[c] + b[c] for each row."""
        if self.weight is None:
            return rows
        out = rows.new_empty((rows.shape[0], self.weight.shape[-1]))
        parts = rows.split(group.sizes), out.split(group.sizes)
        for segment, part, part_out in zip(group.segments, *parts, strict=True):
            part_out = segment.by_class(part_out)
            weight = self.entries(self.weight, segment)
            torch.matmul(segment.by_class(part), weight, out=part_out)
            if self.bias is not None:
                part_out += self.entries(self.bias, segment).unsqueeze(-2)
        return out


class SideGrad(Gradients):
    """The gradients of a `Side`, to which `add` adds group by group.

    Gradients of tokens are summed in `sum_dtype` and rounded once at the end. Gradients of a table
    are written in its own dtype, class by class, so that no second table in float32 is needed. If
    the rows of a class come in several groups, its sum is carried from one to the next in
    `sum_dtype` (`carry`), and is rounded when the last has been added.

    Args:
        side: the operand.
        x, weight, bias: which of its gradients are wanted.
    """

    def __init__(self, side: Side, x: bool, weight: bool, bias: bool):
        self.side = side
        self.sum_dtype = sum_dtype(side.x.dtype)
        self.x = torch.zeros_like(side.x, dtype=self.sum_dtype) if x else None
        self.weight = _empty_like(side.weight) if weight else None
        self.bias = _empty_like(side.bias) if bias else None
        self.carry: dict[str, Tensor] = {}

    def add(self, group: Group, rows: Tensor, grad: Tensor) -> None:
        """Add what the rows of a group contribute.

        Args:
            group: the group.
            rows: [rows, C], the tokens that `Side.gather` returned.
            grad: [rows, H · D], the gradient of what `Side.project` returned.
        """
        side, sizes = self.side, group.sizes
        parts = zip(rows.split(sizes), grad.split(sizes), strict=True)
        for segment, (tokens, part) in zip(group.segments, parts, strict=True):
            tokens, part = segment.by_class(tokens), segment.by_class(part)
            if self.weight is not None:
                if self.weight.dtype == grad.dtype == self.sum_dtype:
                    # No rounding takes place, so the product is added in place. beta=0 overwrites,
                    # so that a table's gradient does not have to be zeroed first.
                    out = _entries(self.weight, segment.classes)
                    add = out.baddbmm_ if part.ndim == 3 else out.addmm_
                    add(tokens.mT, part, beta=0 if segment.first else 1)
                else:
                    self._write("weight", self.weight, segment, tokens.mT @ part)
            if self.bias is not None:
                self._write("bias", self.bias, segment, part.sum(-2, dtype=self.sum_dtype))
        if self.x is not None:
            if side.weight is not None:
                back = grad.new_empty((grad.shape[0], side.x.shape[-1]))  # [rows, C]
                pieces = grad.split(sizes), back.split(sizes)
                for segment, part, out in zip(group.segments, *pieces, strict=True):
                    matrix = side.entries(side.weight, segment).mT
                    torch.matmul(segment.by_class(part), matrix, out=segment.by_class(out))
                grad = back
            _scatter_add(self.x, side.positions[group.pairs], grad)

    def _write(self, name: str, table: Tensor, segment: Segment, part: Tensor) -> None:
        """Write the sum of a segment's classes, or carry it if more rows of a class follow."""
        if not segment.first:
            part = self.carry.pop(name).add_(part)
        if not segment.last:
            self.carry[name] = part.to(self.sum_dtype)
            return
        by_class = part.unbind() if len(segment.classes) > 1 else (part,)
        for cls, entry in zip(segment.classes, by_class, strict=True):
            table[cls].copy_(entry)

    def finish(self, order: Order) -> tuple[Tensor, ...]:
        """The gradients of x [B, tokens, C], weight and bias; an unwanted one is empty.

        Classes without a pair have not been written by `add`, and are set to zero here.
        """
        for table in (self.weight, self.bias):
            if table is not None:
                if self.side.batch:
                    table[list(order.empty)] = 0
                else:
                    table.zero_()
        x = None if self.x is None else self.x.transpose(0, 1).to(self.side.x.dtype).contiguous()
        return self.returned(self.side.x, x, self.weight, self.bias)


def _empty_like(table: Tensor | None) -> Tensor | None:
    """Uninitialised contiguous memory for the gradient of a table."""
    return None if table is None else torch.empty_like(table, memory_format=torch.contiguous_format)


# -- Steps on the rows of a group -----------------------------------------------------------------


def _split(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors [pairs, ...] along the pairs into parts of about 2 · ELEMENTS numbers.

    In half precision a group has HALF_TIMES more numbers. Steps that convert rows to float32 take
    them in these parts, which stay in the cache. In full precision a group is one part.
    """
    pairs = max(1, 2 * ELEMENTS // max(tensors[0][:1].numel(), 1))
    return zip(*(t.split(pairs) for t in tensors), strict=True)


def _dot(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write the products per head of two sets of rows to `out`; `left` may be overwritten.

    Args:
        left, right: [rows, H · D].
        out: [pairs, B, H].
    """
    shape = *out.shape, left.shape[-1] // out.shape[-1]  # [pairs, B, H, D]
    for part, other, part_out in _split(left.view(shape), right.view(shape), out):
        torch.sum(part.to(out.dtype).mul_(other), -1, out=part_out)


def _scale(rows: Tensor, factors: Tensor) -> Tensor:
    """Multiply rows [rows, H · D] in place by a factor [pairs, B, H] per head, and return them.

    Overwriting is safe. The rows are projections, which nothing else reads, or the tokens of a side
    without a table, whose gradients do not depend on the tokens.
    """
    shape = *factors.shape, rows.shape[-1] // factors.shape[-1]  # [pairs, B, H, D]
    for part, factor in _split(rows.view(shape), factors.unsqueeze(-1)):
        part *= factor
    return rows


def _scatter_add(
    total: Tensor, positions: Tensor, rows: Tensor, factors: Tensor | None = None
) -> None:
    """Add the rows of each pair to its token in `total`.

    Args:
        total: [tokens, B, channels].
        positions: [pairs], the token of each pair.
        rows: [rows, channels], which may be overwritten.
        factors: [pairs, B, H], by which the rows are multiplied per head.
    """
    rows, more = rows.view(-1, *total.shape[1:]), () if factors is None else (factors,)
    for part, tokens, *factor in _split(rows, positions, *more):
        part = part.to(total.dtype)
        total.index_add_(0, tokens, _scale(part, *factor) if factor else part)


def _to_pairs(dense: Tensor, order: Order) -> Tensor:
    """Gather [B, H, N, M] in the order of the pairs: [P, B, H]."""
    batch, heads = dense.shape[:2]
    cells = dense.reshape(batch * heads, dense.shape[2] * dense.shape[3]).t().contiguous()
    return cells.index_select(0, order.flat).view(len(order.flat), batch, heads)


def _to_dense(by_pair: Tensor, order: Order, layout: Layout) -> Tensor:
    """The inverse of `_to_pairs`: [P + 1, B, H] -> [B, H, N, M].

    The last entry of `by_pair` is what absent pairs get.
    """
    _, batch, heads = by_pair.shape
    cells = by_pair.flatten(1).index_select(0, order.slot)  # [N · M, B · H]
    return cells.t().contiguous().view(batch, heads, layout.n_queries, layout.n_keys)


# -- The primitives --------------------------------------------------------------------------------


def scores(query: Operand, key: Operand, heads: int, scale: float, layout: Layout) -> Tensor:
    """The scores of all pairs, [B, H, N, M]; -inf where a pair is absent."""
    x = query.x
    order = order_of(layout, x.device)
    q, k = Side(query, order.query), Side(key, order.key)
    out = x.new_empty((len(order.flat) + 1, q.batch, heads), dtype=sum_dtype(x.dtype))
    for group in groups(order, x):
        # The projected rows have no names here, so that they are freed before the next group.
        _dot(q.project(q.gather(group), group), k.project(k.gather(group), group), out[group.pairs])
    if scale != 1.0:
        out *= scale
    out[-1] = float("-inf")
    return _to_dense(out, order, layout)


def scores_backward(
    grad: Tensor, query: Operand, key: Operand, heads: int, scale: float, layout: Layout,
    wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of both operands, in the order x, x, weight, weight, bias, bias.

    Args:
        grad: [B, H, N, M], the gradient of the scores.
        query, key, heads, scale, layout: as in `scores`.
        wanted: which of the six gradients are needed. An empty tensor is returned for the others.
    """
    order = order_of(layout, query.x.device)
    q, k = Side(query, order.query), Side(key, order.key)
    grad_q = SideGrad(q, wanted[0], wanted[2], wanted[4])
    grad_k = SideGrad(k, wanted[1], wanted[3], wanted[5])
    grad = _to_pairs(grad, order)
    if scale != 1.0:
        grad = grad * scale
    for group in groups(order, query.x):
        q_rows, k_rows = q.gather(group), k.gather(group)
        ds = grad[group.pairs]
        if grad_q.wanted:
            grad_q.add(group, q_rows, _scale(k.project(k_rows, group), ds))
        if grad_k.wanted:
            grad_k.add(group, k_rows, _scale(q.project(q_rows, group), ds))
    dxq, dwq, dbq = grad_q.finish(order)
    dxk, dwk, dbk = grad_k.finish(order)
    return dxq, dxk, dwq, dwk, dbq, dbk


def mix(a: Tensor, value: Operand, layout: Layout) -> Tensor:
    """The projected values, summed with the weights `a` [B, H, N, M]: [B, N, H · D]."""
    x = value.x
    order = order_of(layout, x.device)
    v = Side(value, order.key)
    weights = _to_pairs(a, order)
    out = x.new_zeros((layout.n_queries, v.batch, value.inner), dtype=sum_dtype(x.dtype))
    for group in groups(order, x):
        _scatter_add(
            out,
            order.query[group.pairs],
            v.project(v.gather(group), group),
            weights[group.pairs],
        )
    return out.transpose(0, 1).to(x.dtype).contiguous()


def mix_backward(
    grad: Tensor, a: Tensor, value: Operand, layout: Layout, wanted: list[bool]
) -> tuple[Tensor, ...]:
    """The gradients of a, x, weight and bias.

    Args:
        grad: [B, N, H · D], the gradient of the output.
        a, value, layout: as in `mix`.
        wanted: which of the four gradients are needed. An empty tensor is returned for the others.
    """
    x = value.x
    order = order_of(layout, x.device)
    v = Side(value, order.key)
    weights = _to_pairs(a, order)
    output = Side(Operand(grad), order.query)
    shape = len(weights) + 1, *weights.shape[1:]
    da = weights.new_zeros(shape, dtype=sum_dtype(x.dtype)) if wanted[0] else None
    grad_v = SideGrad(v, *wanted[1:])
    for group in groups(order, x):
        rows, dy = v.gather(group), output.gather(group)
        if da is not None:
            _dot(v.project(rows, group), dy, da[group.pairs])
        if grad_v.wanted:
            grad_v.add(group, rows, _scale(dy, weights[group.pairs]))
    da = x.new_empty(0) if da is None else _to_dense(da, order, layout).to(a.dtype)
    return da, *grad_v.finish(order)
