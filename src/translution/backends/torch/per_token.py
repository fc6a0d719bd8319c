"""The primitives and their gradients for layouts in which a token meets many tokens of one class.

With buckets, most classes stand for many offsets. A token then meets several partners of one class,
and the general way (`offset.py`) would multiply it by the same matrix once for each of them. Here
every token is projected once per class, K · (N + M) projections in place of 2 P, and the products
of projected tokens are ordinary matrix products over blocks of queries and keys:

    s_ij = q^c_i · k^c_j        y_i = Σ_c Σ_j∈c a_ij v^c_j        where q^c = x Wq[c] and so on

The pairs are divided into blocks of neighbouring queries and keys (`Block`). A block holds each
class that occurs in it; a mask says for which of its pairs. With buckets in one dimension, most
blocks have one class, and no mask. Only the projections of one class exist at a time, and the
backward pass computes them again.

    B batch   N queries   M keys   P pairs   K classes   C channels   H heads   D head_dim
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...caches import cached
from ...layouts import Layout
from ...operands import Operand
from .groups import Gradients, sum_dtype

__all__ = ["Size", "counts_of", "mix", "mix_backward", "never", "pays", "scores", "scores_backward"]

BLOCK = {"cpu": 64, "cuda": 256}
"""The side of a block, by kind of device. Smaller ones have fewer pairs of other classes, which are
multiplied in vain; larger ones are fewer calls."""
Size = tuple[int, int] | None

# What other work costs beside a multiply-add of a projection, measured on a CPU in both directions:
ROW = 20, 63  # around the projection of a row per token and per pair, per channel of its result
PRODUCT = 2.4, 63  # a pair within a block, per channel and per head
CALL = 1_000_000  # the calls for a block, whatever the batch


class Block(NamedTuple):
    """The pairs of one class among some neighbouring queries and keys.

    Attributes:
        queries, keys: slices of those of the class (`Class`).
        mask: uint8 [queries, keys], 1 for the pairs of the class; None if all of them are.
    """

    queries: slice
    keys: slice
    mask: Tensor | None


class Class(NamedTuple):
    """A class with its pairs.

    Attributes:
        number: its entry in a table.
        queries, keys: the tokens among which its pairs are.
        blocks: its pairs.
    """

    number: int
    queries: slice
    keys: slice
    blocks: tuple[Block, ...]


class Counts(NamedTuple):
    """What a layout costs in each sample, if tokens are projected once per class.

    Attributes:
        pairs: P, the present pairs.
        queries, keys: the tokens that are projected on either side, once for each of their classes.
        products: the pairs of all blocks, once for each class of a block.
        blocks: the number of blocks.
    """

    pairs: int
    queries: int
    keys: int
    products: int
    blocks: int


def pays(layout: Layout, query: Size, key: Size, heads: int, batch: int, device: Any) -> bool:
    """Whether projecting each token once per class takes less time than once per pair.

    Args:
        layout: the pairs.
        query, key: (channels, heads · head_dim) of the table of either side, or None without one.
        heads: H.
        batch: B.
        device: where it is computed.
    """
    if _never or layout.buckets is None:  # without buckets, each offset has a class of its own
        return False
    counts, by_pair = counts_of(layout, device), 0.0
    by_token = counts.blocks * CALL / max(batch, 1)
    for size, tokens in ((query, counts.queries), (key, counts.keys)):
        if size is not None:
            channels, inner = size
            by_pair += counts.pairs * inner * (channels + ROW[1])
            by_token += tokens * inner * (channels + ROW[0])
    inner = max(size[1] for size in (query, key) if size is not None)
    by_token += counts.products * (inner * PRODUCT[0] + heads * PRODUCT[1])
    return by_token < by_pair


_never = False  # of the whole process: a backward pass may run in another thread


@contextmanager
def never() -> Iterator[None]:
    """Project each token once per pair inside of this block, so that both ways can be compared."""
    global _never
    before, _never = _never, True
    try:
        yield
    finally:
        _never = before


def counts_of(layout: Layout, device: torch.device) -> Counts:
    """The `Counts` of a layout."""
    return _counts(layout, device, _side(device))


def _side(device: torch.device) -> int:
    return BLOCK.get(device.type, BLOCK["cuda"])


@cached
def _counts(layout: Layout, device: torch.device, side: int) -> Counts:
    pairs = queries = keys = products = blocks = 0
    for found in blocks_of(layout, torch.device("cpu"), side):  # others have to be read
        queries += _length(found.queries)
        keys += _length(found.keys)
        blocks += len(found.blocks)
        for block in found.blocks:
            area = _length(block.queries) * _length(block.keys)
            products += area
            pairs += area if block.mask is None else int(block.mask.sum())
    return Counts(pairs, queries, keys, products, blocks)


@cached
def blocks_of(layout: Layout, device: torch.device, side: int) -> tuple[Class, ...]:
    """The classes that have a pair, with their pairs in blocks of `side` queries and keys."""
    index = layout.index_on("cpu")
    found: dict[int, list[tuple[slice, slice, Tensor | None]]] = {}
    for rows in _slices(layout.n_queries, side):
        for columns in _slices(layout.n_keys, side):
            part = index[rows, columns]
            for number in part.unique().tolist():
                if number < 0:
                    continue
                mask = part == number
                blocks = found.setdefault(number, [])
                if not mask.all():
                    blocks.append((rows, columns, mask.to(device, torch.uint8)))
                elif blocks and _continues(blocks[-1], rows, columns):
                    blocks[-1] = rows, slice(blocks[-1][1].start, columns.stop), None
                else:
                    blocks.append((rows, columns, None))
    classes = []
    for number, blocks in sorted(found.items()):
        queries, keys = _span([b[0] for b in blocks]), _span([b[1] for b in blocks])
        own = [Block(_within(b[0], queries), _within(b[1], keys), b[2]) for b in blocks]
        classes.append(Class(number, queries, keys, tuple(own)))
    return tuple(classes)


def _continues(block: tuple[slice, slice, Tensor | None], rows: slice, columns: slice) -> bool:
    """Whether a block without a mask can grow by these columns."""
    return block[2] is None and block[0] == rows and block[1].stop == columns.start


def _slices(size: int, each: int) -> list[slice]:
    return [slice(start, min(start + each, size)) for start in range(0, size, each)]


def _span(slices: list[slice]) -> slice:
    return slice(min(s.start for s in slices), max(s.stop for s in slices))


def _within(part: slice, whole: slice) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)


def _length(part: slice) -> int:
    return int(part.stop - part.start)


# -- One side of the pairs and its gradients -------------------------------------------------------


class Side:
    """One operand of a primitive, projected class by class.

    Attributes:
        heads: H.
        dtype: the dtype in which projections are multiplied with each other.
    """

    def __init__(self, operand: Operand, heads: int):
        self.operand, self.heads = operand, heads
        self.dtype = sum_dtype(operand.x.dtype)
        self._whole = self.split(operand.x) if operand.weight is None else None

    def project(self, number: int, tokens: slice) -> Tensor:
        """The tokens projected by a class's matrix, [B · H, tokens, D]."""
        if self._whole is not None:
            return self._whole[:, tokens]
        x, weight, bias = self.operand
        assert weight is not None
        rows = x[:, tokens] @ weight[number].to(x.dtype)
        if bias is not None:
            rows += bias[number].to(x.dtype)
        return self.split(rows)

    def split(self, x: Tensor) -> Tensor:
        """[B, tokens, H · D] -> [B · H, tokens, D], contiguous, in the dtype of products."""
        by_head = x.to(self.dtype).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return by_head.contiguous().flatten(0, 1)

    def join(self, by_head: Tensor) -> Tensor:
        """The inverse of `split`, in the dtype of products."""
        return by_head.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)


class SideGrad(Gradients):
    """The gradients of a `Side`, to which `add` adds class by class.

    Args:
        side: the operand.
        x, weight, bias: which of its gradients are wanted.
    """

    def __init__(self, side: Side, x: bool, weight: bool, bias: bool):
        self.side, (tokens, table, shift) = side, side.operand
        self.x = tokens.new_zeros(tokens.shape, dtype=side.dtype) if x else None
        self.weight = torch.zeros_like(table) if weight and table is not None else None
        self.bias = torch.zeros_like(shift) if bias and shift is not None else None

    def add(self, number: int, tokens: slice, grad: Tensor) -> None:
        """Add what one class contributes.

        Args:
            number: the class.
            tokens: its tokens.
            grad: [B · H, tokens, D], the gradient of what `Side.project` returned.
        """
        x, table, _ = self.side.operand
        rows = self.side.join(grad)  # [B, tokens, H · D]
        if self.bias is not None:
            self.bias[number] = rows.sum((0, 1))
        rows = rows.to(x.dtype) if table is not None else rows
        if self.weight is not None:
            self.weight[number] = x[:, tokens].flatten(0, 1).mT @ rows.flatten(0, 1)
        if self.x is not None:
            self.x[:, tokens] += rows if table is None else rows @ table[number].to(x.dtype).mT

    def finish(self) -> tuple[Tensor, ...]:
        """The gradients of x, weight and bias; an unwanted one is an empty tensor of its own."""
        like = self.side.operand.x
        x = None if self.x is None else self.x.to(like.dtype)
        return self.returned(like, x, self.weight, self.bias)


# -- The primitives --------------------------------------------------------------------------------


def _classes(layout: Layout, x: Tensor) -> tuple[Class, ...]:
    return blocks_of(layout, x.device, _side(x.device))


def _of(cells: Tensor, found: Class, block: Block) -> Tensor:
    """The cells [B · H, queries, keys] of a block, as a view of those of all pairs."""
    rows, columns = (
        slice(whole.start + part.start, whole.start + part.stop)
        for whole, part in ((found.queries, block.queries), (found.keys, block.keys))
    )
    return cells[:, rows, columns]


def _read(cells: Tensor, found: Class, block: Block) -> Tensor:
    """The cells of a block, with zeros for pairs of other classes."""
    part = _of(cells, found, block)
    return part if block.mask is None else part.masked_fill(block.mask == 0, 0.0)


def _write(cells: Tensor, found: Class, block: Block, values: Tensor) -> None:
    """Write the cells of a block that are of its class."""
    part = _of(cells, found, block)
    part.copy_(values if block.mask is None else torch.where(block.mask != 0, values, part))


def scores(query: Operand, key: Operand, heads: int, scale: float, layout: Layout) -> Tensor:
    """The scores of all pairs, [B, H, N, M]; -inf where a pair is absent."""
    q_side, k_side = Side(query, heads), Side(key, heads)
    shape = query.x.shape[0] * heads, layout.n_queries, layout.n_keys
    out = query.x.new_full(shape, float("-inf"), dtype=q_side.dtype)
    for found in _classes(layout, query.x):
        q = q_side.project(found.number, found.queries) * scale
        k = k_side.project(found.number, found.keys)
        for block in found.blocks:
            _write(out, found, block, q[:, block.queries] @ k[:, block.keys].mT)
    return out.unflatten(0, (-1, heads))


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
    q_side, k_side = Side(query, heads), Side(key, heads)
    grad_q = SideGrad(q_side, wanted[0], wanted[2], wanted[4])
    grad_k = SideGrad(k_side, wanted[1], wanted[3], wanted[5])
    cells = grad.to(q_side.dtype).flatten(0, 1)
    for found in _classes(layout, query.x):
        q = q_side.project(found.number, found.queries)
        k = k_side.project(found.number, found.keys)
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        for block in found.blocks:
            ds = _read(cells, found, block)
            if grad_q.wanted:
                dq[:, block.queries].baddbmm_(ds, k[:, block.keys], alpha=scale)
            if grad_k.wanted:
                dk[:, block.keys].baddbmm_(ds.mT, q[:, block.queries], alpha=scale)
        if grad_q.wanted:
            grad_q.add(found.number, found.queries, dq)
        if grad_k.wanted:
            grad_k.add(found.number, found.keys, dk)
    dxq, dwq, dbq = grad_q.finish()
    dxk, dwk, dbk = grad_k.finish()
    return dxq, dxk, dwq, dwk, dbq, dbk


def mix(a: Tensor, value: Operand, layout: Layout) -> Tensor:
    """The projected values, summed with the weights `a` [B, H, N, M]: [B, N, H · D]."""
    heads = a.shape[1]
    side = Side(value, heads)
    weights = a.to(side.dtype).flatten(0, 1)
    shape = len(weights), layout.n_queries, value.inner // heads
    out = value.x.new_zeros(shape, dtype=side.dtype)
    for found in _classes(layout, value.x):
        v = side.project(found.number, found.keys)
        y = out[:, found.queries]
        for block in found.blocks:
            y[:, block.queries].baddbmm_(_read(weights, found, block), v[:, block.keys])
    return side.join(out).to(value.x.dtype)


def mix_backward(
    grad: Tensor, a: Tensor, value: Operand, layout: Layout, wanted: list[bool]
) -> tuple[Tensor, ...]:
    """The gradients of a, x, weight and bias.

    Args:
        grad: [B, N, H · D], the gradient of the output.
        a, value, layout: as in `mix`.
        wanted: which of the four gradients are needed. An empty tensor is returned for the others.
    """
    side = Side(value, a.shape[1])
    grad_v = SideGrad(side, *wanted[1:])
    weights, dy = a.to(side.dtype).flatten(0, 1), side.split(grad)
    da = torch.zeros_like(weights) if wanted[0] else None
    for found in _classes(layout, value.x):
        v, up = side.project(found.number, found.keys), dy[:, found.queries]
        dv = torch.zeros_like(v)
        for block in found.blocks:
            if da is not None:
                _write(da, found, block, up[:, block.queries] @ v[:, block.keys].mT)
            if grad_v.wanted:
                part = _read(weights, found, block)
                dv[:, block.keys].baddbmm_(part.mT, up[:, block.queries])
        if grad_v.wanted:
            grad_v.add(found.number, found.keys, dv)
    da_whole = value.x.new_empty(0) if da is None else da.view_as(a).to(a.dtype)
    return da_whole, *grad_v.finish()
