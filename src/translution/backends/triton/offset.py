"""The primitives and their gradients, made of the kernels.

Going forward, q, k and v of a pair never reach memory. Going back, what each pair passes on to its
query, key or value is written as one row per pair and sample, for a few classes at a time (`MEMORY`
in `launch` bounds it), and then summed by token and by class. With small tables nothing is written
at all: see `small`. There are no atomics, so equal inputs give equal bits.

Tables come in the dtype of the tokens or wider (under autocast); they are cast once per call.
Gradients of tokens are summed wide over the chunks, those of tables are written once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...layouts import Layout
from ..torch.offset import wide
from .blocks import fits_small
from .launch import Problem, Side
from .small import SmallProblem

__all__ = ["mix", "mix_backward", "scores", "scores_backward"]


def scores(
    xq: Tensor, xk: Tensor, wq: Tensor | None, wk: Tensor | None, bq: Tensor | None,
    bk: Tensor | None, heads: int, scale: float, layout: Layout,
) -> Tensor:  # fmt: skip
    """[batch, heads, queries, keys]: the scores, -inf where a pair is absent."""
    xq, xk = _aligned(xq), _aligned(xk)
    wq, wk, bq, bk = (_cast(t, xq.dtype) for t in (wq, wk, bq, bk))
    problem = _problem(layout, xq, heads, (xq if wq is None else wq).shape[-1], wq, wk)
    shape = (problem.batch, heads, problem.queries, problem.keys)
    if layout.full:
        s = xq.new_empty(shape, dtype=problem.wide)
    else:
        s = xq.new_full(shape, float("-inf"), dtype=problem.wide)
    if problem.empty:
        return s
    if isinstance(problem, SmallProblem):
        problem.scores(xq, xk, wq, wk, bq, bk, scale, s)
    else:
        problem.pair_products("scores", xq, xk, wq, wk, bq, bk, scale, s=s)
    return s


def scores_backward(
    grad: Tensor, xq: Tensor, xk: Tensor, wq: Tensor | None, wk: Tensor | None,
    bq: Tensor | None, bk: Tensor | None, heads: int, scale: float, layout: Layout,
    wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The wanted gradients of xq, xk, wq, wk, bq, bk; empty tensors for the others."""
    dxq, dxk, dwq, dwk, dbq, dbk = _rooms((xq, xk, wq, wk, bq, bk), wanted, tokens=2)
    grad, xq, xk = _aligned(grad), _aligned(xq), _aligned(xk)
    wq, wk, bq, bk = (_cast(t, xq.dtype) for t in (wq, wk, bq, bk))
    problem = _problem(layout, xq, heads, (xq if wq is None else wq).shape[-1], wq, wk)
    query, key = Side(True, xq, wq, dxq, dwq, dbq), Side(False, xk, wk, dxk, dwk, dbk)
    count = query.wanted + key.wanted
    if problem.empty:
        _clear(dwq, dwk, dbq, dbk)
    elif isinstance(problem, SmallProblem):
        if dxq is not None:
            dxq = problem.sums(True, xk, wq, wk, bk, scale, grad)
        if dxk is not None:
            dxk = problem.sums(False, xq, wk, wq, bq, scale, grad)
        found = {"dwq": dwq, "dwk": dwk, "dbq": dbq, "dbk": dbk}
        problem.tables(xq, xk, wq, wk, bq, bk, scale, grad, found)
    elif count:
        chunks = problem.chunks(count * problem.inner * xq.element_size())
        to_q, to_k = (problem.rows(chunks, xq) if side.wanted else None for side in (query, key))
        for at in range(len(chunks.classes)):
            problem.pair_products(
                "score_grads", xq, xk, wq, wk, bq, bk, scale,
                ds=grad, to_q=to_q, to_k=to_k, chunks=chunks, at=at,
            )  # fmt: skip
            problem.gradients(chunks, at, (query, to_q), (key, to_k))
    return _results(xq, (dxq, dxk, dwq, dwk, dbq, dbk))


def mix(a: Tensor, x: Tensor, w: Tensor, b: Tensor | None, layout: Layout) -> Tensor:
    """[batch, queries, heads · head_dim]: the values, projected and mixed by the weights a."""
    a, x, w, b = _aligned(a), _aligned(x), _cast(w, x.dtype), _cast(b, x.dtype)
    problem = _problem(layout, x, a.shape[1], w.shape[-1], w)
    if problem.empty:
        return x.new_zeros(problem.batch, problem.queries, problem.inner)
    if isinstance(problem, SmallProblem):
        return problem.sums(True, x, None, w, b, 1.0, a)
    return problem.mix(a, x, w, b)


def mix_backward(
    grad: Tensor, a: Tensor, x: Tensor, w: Tensor, b: Tensor | None, layout: Layout,
    wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The wanted gradients of a, x, w, b; empty tensors for the others."""
    dx, dw, db = _rooms((x, w, b), wanted[1:], tokens=1)
    grad, a, x = _aligned(grad.to(x.dtype)), _aligned(a), _aligned(x)
    w, b = _cast(w, x.dtype), _cast(b, x.dtype)
    problem = _problem(layout, x, a.shape[1], w.shape[-1], w)
    da = None
    if wanted[0]:
        written = layout.full and not problem.empty
        da = torch.empty_like(a) if written else torch.zeros_like(a)
    value = Side(False, x, w, dx, dw, db)
    # the products that give the weights' gradients also give the rows: grad · v, and a · grad
    products = ("mix_grads", grad, x, None, w, None, b, 1.0)
    if problem.empty:
        _clear(dw, db)
    elif isinstance(problem, SmallProblem):
        if da is not None:
            problem.scores(grad, x, None, w, None, b, 1.0, da)
        if dx is not None:
            dx = problem.sums(False, grad, w, None, None, 1.0, a)
        found = {"dwq": None, "dwk": dw, "dbq": None, "dbk": db}
        problem.tables(grad, x, None, w, None, b, 1.0, a, found)
    elif value.wanted:
        chunks = problem.chunks(problem.inner * x.element_size())
        rows = problem.rows(chunks, x)
        for at in range(len(chunks.classes)):
            problem.pair_products(*products, s=da, ds=a, to_k=rows, chunks=chunks, at=at)
            problem.gradients(chunks, at, (value, rows))
    elif da is not None:
        problem.pair_products(*products, s=da)
    return _results(x, (da, dx, dw, db), first=1)


def _problem(layout: Layout, x: Tensor, heads: int, inner: int, *tables: Tensor | None) -> Problem:
    """The path that serves tables of this size."""
    channels = max(w.shape[-2] for w in tables if w is not None)
    kind = SmallProblem if fits_small(channels, heads, inner // heads) else Problem
    return kind(layout, x, heads, inner)


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, and beginning where vectors of 16 bytes may begin: kernels are compiled for
    that, and a view that begins elsewhere would compile them once more."""
    x = x.contiguous()
    return x.clone() if x.device.type == "cuda" and x.data_ptr() % 16 else x


def _cast(table: Tensor | None, dtype: torch.dtype) -> Any:
    return None if table is None else _aligned(table.to(dtype))


def _rooms(
    tensors: tuple[Tensor | None, ...], wanted: list[bool], tokens: int
) -> list[Tensor | None]:
    """Room for the gradients. Those of the first `tokens` tensors are summed wide, from zero; those
    of tables are written once."""
    rooms = list[Tensor | None]()
    for i, (t, want) in enumerate(zip(tensors, wanted, strict=True)):
        if not want or t is None:
            rooms.append(None)
        elif i < tokens:
            rooms.append(t.new_zeros(t.shape, dtype=wide(t.dtype)))
        else:
            rooms.append(torch.empty_like(t, memory_format=torch.contiguous_format))
    return rooms


def _clear(*tensors: Tensor | None) -> None:
    for t in tensors:
        if t is not None:
            t.zero_()


def _results(x: Tensor, grads: tuple[Tensor | None, ...], first: int = 0) -> tuple[Tensor, ...]:
    """Operators return tensors: an unwanted one is empty. Tokens' gradients stand from `first`."""
    last = first + (2 if len(grads) == 6 else 1)
    return tuple(
        x.new_empty(0) if t is None else t.to(x.dtype) if first <= i < last else t
        for i, t in enumerate(grads)
    )
