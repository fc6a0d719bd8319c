"""The Triton backend: what `kernels.py` computes, and how the primitives are made of it.

Going forward, q, k and v of a pair never reach device memory. Going back, what the scores pass on
to q and k is written for the pairs of a few classes at a time, in no more room than the scores
take, and then summed by token and by class. There are no atomics: equal inputs give equal bits.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layouts import Layout, Pairs
from ..torch.offset import wide
from .support import interpreted

__all__ = ["mix", "mix_backward", "scores", "scores_backward"]

ROOM = 1.0
"""Room for what the scores pass on, over that of the scores themselves."""


class Sides(NamedTuple):
    """What the kernels look up by pair: sorted by class, and by token on each side."""

    pairs: Pairs
    bounds: Tensor  # int32 [classes + 1]: the first pair of each class
    classes: Tensor  # int32 [pairs]
    by_query: Tensor  # int32 [pairs]: pairs in the order of their queries, then classes
    by_key: Tensor
    query_order: Tensor  # int64 [pairs]: query · pairs + pair, sorted: where chunks begin
    key_order: Tensor


@functools.lru_cache(maxsize=64)
def _sides(layout: Layout, device: torch.device) -> Sides:
    pairs = layout.pairs_on(device)
    count = pairs.starts[-1]
    bounds = torch.tensor(pairs.starts, dtype=torch.int32, device=device)
    sizes = (bounds[1:] - bounds[:-1]).long()
    classes = torch.arange(len(sizes), device=device).repeat_interleave(sizes)
    each = torch.arange(count, device=device)
    orders = [(side.long() * count + each).sort() for side in (pairs.query, pairs.key)]
    return Sides(
        pairs, bounds, classes.int(), *(o.indices.int() for o in orders),
        *(o.values for o in orders),
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _tiles(layout: Layout, device: torch.device, batch: int, rows: int) -> tuple[Tensor, list[int]]:
    """int32 [tiles, 3] (class, first row, row after the last of its class), and the first tile of
    each class."""
    starts = layout.pairs_on(device).starts
    found, firsts = list[tuple[int, int, int]](), [0]
    for cls, (start, stop) in enumerate(itertools.pairwise(starts)):
        found += [(cls, row, stop * batch) for row in range(start * batch, stop * batch, rows)]
        firsts.append(len(found))
    table = torch.tensor(found, dtype=torch.int32).reshape(-1, 3)
    return table.to(device), firsts


def _precision(x: Tensor) -> str:
    """tf32 only where torch allows it."""
    allowed = x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def _power(n: int, least: int, most: int) -> int:
    return max(least, min(most, 1 << max(0, n - 1).bit_length()))


class _Problem:
    """Sizes, tables and launches of one call."""

    def __init__(self, layout: Layout, x: Tensor, heads: int, inner: int):
        import triton.language as tl

        self.layout, self.device, self.batch = layout, x.device, x.shape[0]
        self.sides = _sides(layout, x.device)
        self.heads, self.inner, self.width = heads, inner, inner // heads
        self.queries, self.keys = layout.n_queries, layout.n_keys
        self.sums = tl.float64 if x.dtype == torch.float64 else tl.float32
        self.precision = _precision(x)
        # a head is one block: its columns are reduced within a program
        self.head_block = _power(self.width, 16, 1 << 30)
        most = 16 if interpreted() else 64 if self.head_block > 64 else 128
        self.row_block = _power(self.batch * self._typical(), 16, most)

    def _typical(self) -> int:
        return max(1, self.sides.pairs.starts[-1] // max(1, len(self.sides.pairs.starts) - 1))

    @property
    def empty(self) -> bool:
        return not self.batch or not self.sides.pairs.starts[-1]

    def common(self) -> dict[str, Any]:
        return {"SUMS": self.sums, "PRECISION": self.precision, "UPCAST": interpreted()}

    def pair_scores(
        self, xq: Tensor, xk: Tensor, wq: Any, wk: Any, bq: Any, bk: Any, scale: float, s: Any,
        ds: Any = None, to_q: Any = None, to_k: Any = None, classes: slice | None = None,
    ) -> None:  # fmt: skip
        from .kernels import pair_scores

        tiles, firsts = _tiles(self.layout, self.device, self.batch, self.row_block)
        first_row = 0
        if classes is not None:
            tiles = tiles[firsts[classes.start] : firsts[classes.stop]]
            first_row = self.sides.pairs.starts[classes.start] * self.batch
        if not len(tiles):
            return
        pairs = self.sides.pairs
        pair_scores[(len(tiles), self.heads)](
            xq, xk, wq, wk, bq, bk, pairs.query, pairs.key, tiles, s, ds, to_q, to_k,
            self.batch, self.queries, self.keys, xq.shape[-1], xk.shape[-1], self.inner,
            self.width, scale, first_row,
            HAS_WQ=wq is not None, HAS_WK=wk is not None,
            HAS_BQ=bq is not None, HAS_BK=bk is not None,
            TO_Q=to_q is not None, TO_K=to_k is not None,
            BLOCK_M=self.row_block, BLOCK_D=self.head_block, **self.common(),
        )  # fmt: skip

    def token_sums(
        self, rows: Tensor, w: Tensor | None, out: Tensor, side: str, *, bias: Any = None,
        a: Tensor | None = None, weighted: str = "no", transposed: bool = False,
        classes: slice | None = None, add: bool = False,
    ) -> None:  # fmt: skip
        """`side`: whose tokens are summed for, "query" or "key"."""
        from .kernels import token_sums

        sides, count = self.sides, self.sides.pairs.starts[-1]
        by_query = side == "query"
        tokens, others = (self.queries, self.keys) if by_query else (self.keys, self.queries)
        order = sides.query_order if by_query else sides.key_order
        begin, end = 0, count
        if classes is not None:
            begin, end = (sides.pairs.starts[c] for c in (classes.start, classes.stop))
        lines = torch.arange(tokens, device=self.device) * count
        starts, stops = (torch.searchsorted(order, lines + at).int() for at in (begin, end))
        columns = out.shape[-1]
        block_m = _power(self.batch, 16, 16 if interpreted() else 64)
        block_n = self.head_block if weighted == "columns" else _power(
            columns, 16, 16 if interpreted() else 128
        )  # fmt: skip
        programs = (tokens * -(-self.batch // block_m), -(-columns // block_n))
        token_sums[programs if weighted != "columns" else (programs[0], self.heads)](
            rows, w, bias, a, out, sides.by_query if by_query else sides.by_key, starts, stops,
            sides.classes, sides.pairs.key if by_query else sides.pairs.query,
            self.batch, tokens, others, rows.shape[-1], columns, self.heads, self.width,
            begin * self.batch,
            self.keys if by_query else 1, 1 if by_query else self.keys, self.queries * self.keys,
            BY_PAIR=classes is not None, HAS_W=w is not None, TRANSPOSED=transposed,
            HAS_BIAS=bias is not None, WEIGHTED=weighted, ADD=add,
            BLOCK_M=block_m, BLOCK_N=block_n, **self.common(),
        )  # fmt: skip

    def class_outer(
        self, x: Tensor, rows: Tensor, dw: Any, db: Any, side: str, *, a: Tensor | None = None,
        classes: slice | None = None,
    ) -> None:  # fmt: skip
        """`side`: whose tokens are x, "query" or "key"."""
        from .kernels import class_outer

        pairs, by_query = self.sides.pairs, side == "query"
        tokens, others = (self.queries, self.keys) if by_query else (self.keys, self.queries)
        near, far = (pairs.query, pairs.key) if by_query else (pairs.key, pairs.query)
        span = classes or slice(0, len(pairs.starts) - 1)
        channels = x.shape[-1]

        def programs(meta: dict[str, int]) -> tuple[int, int, int]:
            parts = -(-channels // meta["BLOCK_K"]) if dw is not None else 1
            return span.stop - span.start, parts, self.heads

        class_outer[programs](
            x, rows, a, dw, db, self.sides.bounds, near, far,
            self.batch, tokens, others, channels, self.inner, self.heads, self.width,
            span.start, pairs.starts[span.start] * self.batch, self.queries, self.keys,
            BY_PAIR=classes is not None, HAS_BIAS=db is not None, HAS_W=dw is not None,
            BLOCK_D=self.head_block, **self.common(),
        )  # fmt: skip

    def chunks(self, row_bytes: int) -> Iterator[slice]:
        """Classes whose rows together take no more than the scores (but one class at least)."""
        starts = self.sides.pairs.starts
        room = ROOM * self.batch * self.heads * self.queries * self.keys * 4
        most = max(1.0, room / max(1, row_bytes * self.batch))
        first = 0
        for cls in range(1, len(starts)):
            if cls == len(starts) - 1 or starts[cls + 1] - starts[first] > most:
                yield slice(first, cls)
                first = cls


def _clean(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


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
    xq, xk, wq, wk, bq, bk = _clean(xq, xk, wq, wk, bq, bk)
    problem = _Problem(layout, xq, heads, _inner(xq, wq))
    shape = (problem.batch, heads, problem.queries, problem.keys)
    s = xq.new_full(shape, float("-inf"), dtype=wide(xq.dtype))
    if not problem.empty:
        problem.pair_scores(xq, xk, wq, wk, bq, bk, scale, s)
    return s


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
    grad, xq, xk, wq, wk, bq, bk = _clean(grad, xq, xk, wq, wk, bq, bk)
    inner = _inner(xq, wq)
    problem = _Problem(layout, xq, heads, inner)
    sums = wide(xq.dtype)
    made = [
        t.new_zeros(t.shape, dtype=sums if i < 2 else None) if want and t is not None else None
        for i, (t, want) in enumerate(zip((xq, xk, wq, wk, bq, bk), wanted, strict=True))
    ]
    grad_sides = [
        ("query", xq, wq, made[0], made[2], made[4]), ("key", xk, wk, made[1], made[3], made[5]),
    ]  # fmt: skip
    used = [any(t is not None for t in side[3:]) for side in grad_sides]
    if not problem.empty and any(used):
        starts = problem.sides.pairs.starts
        for chunk in problem.chunks(sum(used) * inner * xq.element_size()):
            count = (starts[chunk.stop] - starts[chunk.start]) * problem.batch
            rows = [xq.new_empty(count, inner) if use else None for use in used]
            problem.pair_scores(xq, xk, wq, wk, bq, bk, scale, None, grad, rows[0], rows[1], chunk)
            for (side, x, w, dx, dw, db), g in zip(grad_sides, rows, strict=True):
                if g is None:
                    continue
                if dw is not None or db is not None:
                    problem.class_outer(x, g, dw, db, side, classes=chunk)
                if dx is not None:
                    problem.token_sums(g, w, dx, side, transposed=True, classes=chunk, add=True)
    dxq, dxk = (None if t is None else t.to(xq.dtype) for t in made[:2])
    return tuple(xq.new_empty(0) if t is None else t for t in (dxq, dxk, *made[2:]))


def mix(a: Tensor, x: Tensor, w: Tensor, b: Tensor | None, layout: Layout) -> Tensor:
    a, x, w, b = _clean(a, x, w, b)
    problem = _Problem(layout, x, a.shape[1], w.shape[-1])
    y = x.new_empty(problem.batch, problem.queries, problem.inner)
    if problem.batch:
        problem.token_sums(x, w, y, "query", bias=b, a=a, weighted="columns")
    return y


def mix_backward(
    grad: Tensor,
    a: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    layout: Layout,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    grad, a, x, w, b = _clean(grad, a, x, w, b)
    problem = _Problem(layout, x, a.shape[1], w.shape[-1])
    empty = x.new_empty(0)
    da, dx, dw, db = (
        t.new_zeros(t.shape) if want and t is not None else None
        for t, want in zip((a, x, w, b), wanted, strict=True)
    )
    if not problem.empty:
        if da is not None:
            problem.pair_scores(grad, x, None, w, None, b, 1.0, da)
        if dx is not None:
            problem.token_sums(grad, w, dx, "key", a=a, weighted="rows", transposed=True)
        if dw is not None or db is not None:
            problem.class_outer(x, grad, dw, db, "key", a=a)
    found = (da, dx, dw, db)
    return tuple(empty.clone() if t is None else t for t in found)


def _inner(x: Tensor, w: Tensor | None) -> int:
    return (x if w is None else w).shape[-1]
