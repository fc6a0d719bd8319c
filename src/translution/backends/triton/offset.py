"""The two primitives of Translution and their gradients, made of launches of the kernels.

In the forward pass, the projected q, k and v of a pair are never written to memory. In the backward
pass, the gradient of each projected row is written once per pair and sample, for a few classes at a
time (`launch.MEMORY` bounds how many), and is then summed twice: by token, for the gradients of
tokens, and by class, for those of tables. With small tables no row is written at all:
see `small`. Every sum is computed in one order, without atomics, so equal inputs give equal bits.

A table has the dtype of the tokens, or is float32 beside half precision tokens (under autocast); it
is cast once per call. Gradients of tokens are summed over the classes in `sum_dtype` and rounded at
the end. Gradients of tables are written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...layouts import Layout
from ...operands import Operand
from ..torch.offset import sum_dtype
from .blocks import fits_small
from .launch import Problem, Side
from .small import SmallProblem

__all__ = ["mix", "mix_backward", "scores", "scores_backward"]


def scores(query: Operand, key: Operand, heads: int, scale: float, layout: Layout) -> Tensor:
    """The scores of all pairs, [batch, heads, queries, keys]; -inf where a pair is absent."""
    query, key = _prepared(query), _prepared(key)
    problem = _problem(layout, query.x, heads, query.inner, query.weight, key.weight)
    shape = (problem.batch, heads, problem.queries, problem.keys)
    if layout.full:
        s = query.x.new_empty(shape, dtype=problem.sum_dtype)
    else:
        s = query.x.new_full(shape, float("-inf"), dtype=problem.sum_dtype)
    if problem.empty:
        return s
    if isinstance(problem, SmallProblem):
        problem.scores(query, key, scale, s)
    else:
        problem.pair_products("scores", query, key, scale, s=s)
    return s


def scores_backward(
    grad: Tensor, query: Operand, key: Operand, heads: int, scale: float, layout: Layout,
    wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of both operands, in the order x, x, weight, weight, bias, bias.

    Args:
        grad: the gradient of the scores.
        query, key, heads, scale, layout: as in `scores`.
        wanted: which of the six gradients are needed. An empty tensor is returned for the others.
    """
    tensors = query.x, key.x, query.weight, key.weight, query.bias, key.bias
    dxq, dxk, dwq, dwk, dbq, dbk = _empty_gradients(tensors, wanted, tokens=2)
    grad, query, key = _aligned(grad), _prepared(query), _prepared(key)
    problem = _problem(layout, query.x, heads, query.inner, query.weight, key.weight)
    query_side = Side(True, query.x, query.weight, dxq, dwq, dbq)
    key_side = Side(False, key.x, key.weight, dxk, dwk, dbk)
    count = query_side.wanted + key_side.wanted
    if problem.empty:
        _clear(dwq, dwk, dbq, dbk)
    elif isinstance(problem, SmallProblem):
        if dxq is not None:
            dxq = problem.sums(True, query.weight, key, scale, grad)
        if dxk is not None:
            dxk = problem.sums(False, key.weight, query, scale, grad)
        gradients = {"dwq": dwq, "dwk": dwk, "dbq": dbq, "dbk": dbk}
        problem.tables(query, key, scale, grad, gradients)
    elif count:
        chunks = problem.chunks(count * problem.inner * query.x.element_size())
        to_q, to_k = (
            problem.rows(chunks, query.x) if side.wanted else None
            for side in (query_side, key_side)
        )
        for at in range(len(chunks.classes)):
            problem.pair_products(
                "score_grads", query, key, scale,
                ds=grad, to_q=to_q, to_k=to_k, chunks=chunks, at=at,
            )  # fmt: skip
            problem.gradients(chunks, at, (query_side, to_q), (key_side, to_k))
    return _results(query.x, (dxq, dxk, dwq, dwk, dbq, dbk))


def mix(a: Tensor, value: Operand, layout: Layout) -> Tensor:
    """The projected values, summed with the weights `a`: [batch, queries, heads · head_dim]."""
    a, value = _aligned(a), _prepared(value)
    problem = _problem(layout, value.x, a.shape[1], value.inner, value.weight)
    if problem.empty:
        return value.x.new_zeros(problem.batch, problem.queries, problem.inner)
    if isinstance(problem, SmallProblem):
        return problem.sums(True, None, value, 1.0, a)
    return problem.mix(a, value)


def mix_backward(
    grad: Tensor, a: Tensor, value: Operand, layout: Layout, wanted: list[bool]
) -> tuple[Tensor, ...]:
    """The gradients of a, x, weight and bias.

    Args:
        grad: the gradient of the output.
        a, value, layout: as in `mix`.
        wanted: which of the four gradients are needed. An empty tensor is returned for the others.
    """
    dx, dw, db = _empty_gradients(tuple(value), wanted[1:], tokens=1)
    grad, a, value = _aligned(grad.to(value.x.dtype)), _aligned(a), _prepared(value)
    problem = _problem(layout, value.x, a.shape[1], value.inner, value.weight)
    da = None
    if wanted[0]:
        written = layout.full and not problem.empty
        da = torch.empty_like(a) if written else torch.zeros_like(a)
    side, outer = Side(False, value.x, value.weight, dx, dw, db), Operand(grad)
    # One launch computes both da = grad · v and the gradients a · grad of the projected values.
    if problem.empty:
        _clear(dw, db)
    elif isinstance(problem, SmallProblem):
        if da is not None:
            problem.scores(outer, value, 1.0, da)
        if dx is not None:
            dx = problem.sums(False, value.weight, outer, 1.0, a)
        problem.tables(outer, value, 1.0, a, {"dwq": None, "dwk": dw, "dbq": None, "dbk": db})
    elif side.wanted:
        chunks = problem.chunks(problem.inner * value.x.element_size())
        rows = problem.rows(chunks, value.x)
        for at in range(len(chunks.classes)):
            problem.pair_products(
                "mix_grads", outer, value, 1.0, s=da, ds=a, to_k=rows, chunks=chunks, at=at
            )
            problem.gradients(chunks, at, (side, rows))
    elif da is not None:
        problem.pair_products("mix_grads", outer, value, 1.0, s=da)
    return _results(value.x, (da, dx, dw, db), first=1)


def _problem(layout: Layout, x: Tensor, heads: int, inner: int, *tables: Tensor | None) -> Problem:
    """A `SmallProblem` if the tables are small enough for it, else a `Problem`."""
    channels = max(w.shape[-2] for w in tables if w is not None)
    kind = SmallProblem if fits_small(channels, heads, inner // heads) else Problem
    return kind(layout, x, heads, inner)


def _aligned(x: Tensor) -> Tensor:
    """Make a tensor contiguous, and let it begin at a multiple of 16 bytes.

    Kernels are compiled for such addresses. For any other, Triton would compile them once more.
    """
    x = x.contiguous()
    return x.clone() if x.device.type == "cuda" and x.data_ptr() % 16 else x


def _prepared(operand: Operand) -> Operand:
    """Align the tensors of an operand, and cast its table to the dtype of its tokens."""
    x, *table = operand
    return Operand(_aligned(x), *(None if t is None else _aligned(t.to(x.dtype)) for t in table))


def _empty_gradients(
    tensors: tuple[Tensor | None, ...], wanted: list[bool], tokens: int
) -> list[Tensor | None]:
    """Allocate the gradients that are wanted; the others are None.

    The first `tokens` tensors are tokens: their gradients are summed, so they start at zero and are
    of `sum_dtype`. The gradients of tables are written once, and start uninitialised.
    """
    gradients = list[Tensor | None]()
    for i, (t, want) in enumerate(zip(tensors, wanted, strict=True)):
        if not want or t is None:
            gradients.append(None)
        elif i < tokens:
            gradients.append(t.new_zeros(t.shape, dtype=sum_dtype(t.dtype)))
        else:
            gradients.append(torch.empty_like(t, memory_format=torch.contiguous_format))
    return gradients


def _clear(*tensors: Tensor | None) -> None:
    """Set the tensors that are wanted to zero."""
    for t in tensors:
        if t is not None:
            t.zero_()


def _results(x: Tensor, grads: tuple[Tensor | None, ...], first: int = 0) -> tuple[Tensor, ...]:
    """What an operator returns: tensors only, so an unwanted gradient is an empty one.

    The gradients of tokens begin at index `first`. They are rounded to the dtype of the tokens.
    """
    last = first + (2 if len(grads) == 6 else 1)
    return tuple(
        x.new_empty(0) if t is None else t.to(x.dtype) if first <= i < last else t
        for i, t in enumerate(grads)
    )
