"""The two primitives, and the tables of a layout, as operators that are registered with torch.

torch.compile and torch.export see each of them as one node. Their arguments are tensors, numbers
and strings only, so an operand arrives as its three tensors and a layout as its `spec`. A backend
computes them. `functional.offset` has the functions that check arguments and call them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.torch import per_token
from ..layouts import Layout
from ..operands import Operand
from .derivatives import batched, multilinear

__all__ = ["HALF", "layout_index", "layout_positions", "mix", "scores", "shares_projections"]

HALF = (torch.float16, torch.bfloat16)
"""The dtypes whose sums are taken in float32."""


def layout_index(like: Tensor, layout: Layout) -> Tensor:
    """`Layout.index` on the device of a tensor; do not write to it.

    Tracing sees an operator. Otherwise it is looked up directly, which function transforms allow.
    """
    if torch.compiler.is_compiling():
        return torch.ops.translution.layout_index(like, layout.spec)
    return layout.index_on(like.device)


def layout_positions(like: Tensor, layout: Layout) -> Tensor:
    """`Layout.positions` on the device of a tensor, as `layout_index`."""
    if torch.compiler.is_compiling():
        return torch.ops.translution.layout_positions(like, layout.spec)
    return layout.positions(like.device)


@torch.library.custom_op("translution::layout_index", mutates_args=())
def _layout_index(like: Tensor, layout: str) -> Tensor:
    return Layout.parse(layout).index_on(like.device).clone()


@_layout_index.register_fake
def _(like: Tensor, layout: str) -> Tensor:
    parsed = Layout.parse(layout)
    return like.new_empty((parsed.n_queries, parsed.n_keys), dtype=torch.int64)


@torch.library.custom_op("translution::layout_positions", mutates_args=())
def _layout_positions(like: Tensor, layout: str) -> Tensor:
    return Layout.parse(layout).positions(like.device)


@_layout_positions.register_fake
def _(like: Tensor, layout: str) -> Tensor:
    parsed = Layout.parse(layout)
    grid_tokens = parsed.tokens - parsed.prefix
    return like.new_empty((grid_tokens, len(parsed.grid)), dtype=torch.int64)


def shares_projections(layout: Layout, query: Operand | None, key: Operand, heads: int) -> bool:
    """Whether so many pairs of a token have the same class that it is projected once per class.

    The products are then large and dense on every device, so all backends leave them to torch.
    """
    x, sizes = key.x, (_size(query), _size(key))
    return per_token.pays(layout, *sizes, heads, int(x.shape[0]), x.device)


def _size(side: Operand | None) -> per_token.Size:
    weight = None if side is None else side.weight
    return None if weight is None else (int(weight.shape[-2]), int(weight.shape[-1]))


def _computing(
    backend: str, layout: Layout, query: Operand | None, key: Operand, heads: int
) -> Any:
    """The module whose functions compute the primitives for these operands.

    Raises:
        ValueError: the backend is unknown or cannot compute with this dtype on this device.
    """
    chosen = backends.choose(backend, key.x.device, key.x.dtype)
    return per_token if shares_projections(layout, query, key, heads) else chosen


@torch.library.custom_op("translution::offset_scores", mutates_args=())
def _scores(
    xq: Tensor,
    xk: Tensor,
    wq: Tensor | None,
    wk: Tensor | None,
    bq: Tensor | None,
    bk: Tensor | None,
    heads: int,
    scale: float,
    layout: str,
    backend: str,
) -> Tensor:
    query, key, parsed = Operand(xq, wq, bq), Operand(xk, wk, bk), Layout.parse(layout)
    return _computing(backend, parsed, query, key, heads).scores(query, key, heads, scale, parsed)


@_scores.register_fake
def _(xq, xk, wq, wk, bq, bk, heads, scale, layout, backend):  # type: ignore[no-untyped-def]
    parsed = Layout.parse(layout)
    dtype = torch.float32 if xq.dtype in HALF else xq.dtype
    return xq.new_empty((xq.shape[0], heads, parsed.n_queries, parsed.n_keys), dtype=dtype)


@torch.library.custom_op("translution::offset_scores_backward", mutates_args=())
def _scores_backward(
    grad: Tensor,
    xq: Tensor,
    xk: Tensor,
    wq: Tensor | None,
    wk: Tensor | None,
    bq: Tensor | None,
    bk: Tensor | None,
    heads: int,
    scale: float,
    layout: str,
    backend: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    query, key, parsed = Operand(xq, wq, bq), Operand(xk, wk, bk), Layout.parse(layout)
    chosen = _computing(backend, parsed, query, key, heads)
    return chosen.scores_backward(grad, query, key, heads, scale, parsed, wanted)


def _fake_grads(
    tensors: list[Tensor | None], wanted: list[bool], like: Tensor
) -> tuple[Tensor, ...]:
    return tuple(
        t.new_empty(t.shape) if want and t is not None else like.new_empty(0)
        for t, want in zip(tensors, wanted, strict=True)
    )


@_scores_backward.register_fake
def _(grad, xq, xk, wq, wk, bq, bk, heads, scale, layout, backend, wanted):  # type: ignore[no-untyped-def]
    return _fake_grads([xq, xk, wq, wk, bq, bk], wanted, xq)


def _save_scores(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.heads, ctx.scale, ctx.layout, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward_scores(ctx, grad):  # type: ignore[no-untyped-def]
    wanted = list(ctx.needs_input_grad[:6])
    grads = torch.ops.translution.offset_scores_backward(
        grad, *ctx.saved_tensors, ctx.heads, ctx.scale, ctx.layout, ctx.backend, wanted
    )
    return (*_pick(grads, wanted), None, None, None, None)


def _pick(grads: tuple[Tensor, ...], wanted: list[bool]) -> list[Tensor | None]:
    return [grad if want else None for grad, want in zip(grads, wanted, strict=True)]


_scores.register_autograd(_backward_scores, setup_context=_save_scores)


@torch.library.custom_op("translution::offset_mix", mutates_args=())
def _mix(a: Tensor, x: Tensor, w: Tensor, b: Tensor | None, layout: str, backend: str) -> Tensor:
    value, parsed = Operand(x, w, b), Layout.parse(layout)
    return _computing(backend, parsed, None, value, a.shape[1]).mix(a, value, parsed)


@_mix.register_fake
def _(a, x, w, b, layout, backend):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], Layout.parse(layout).n_queries, w.shape[-1]))


@torch.library.custom_op("translution::offset_mix_backward", mutates_args=())
def _mix_backward(
    grad: Tensor,
    a: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    layout: str,
    backend: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    value, parsed = Operand(x, w, b), Layout.parse(layout)
    chosen = _computing(backend, parsed, None, value, a.shape[1])
    return chosen.mix_backward(grad, a, value, parsed, wanted)


@_mix_backward.register_fake
def _(grad, a, x, w, b, layout, backend, wanted):  # type: ignore[no-untyped-def]
    return _fake_grads([a, x, w, b], wanted, x)


def _save_mix(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.layout, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward_mix(ctx, grad):  # type: ignore[no-untyped-def]
    wanted = list(ctx.needs_input_grad[:4])
    grads = torch.ops.translution.offset_mix_backward(
        grad, *ctx.saved_tensors, ctx.layout, ctx.backend, wanted
    )
    return (*_pick(grads, wanted), None, None)


_mix.register_autograd(_backward_mix, setup_context=_save_mix)


# -- Derivatives (see `functional.derivatives`) ----------------------------------------------------


def _projection_terms(
    x: Any, w: Any, b: Any, ux: Any, uw: Any, ub: Any
) -> Iterator[tuple[Any, Any]]:
    """Yield each term of the tangent of x w + b, with a flag for each of its three tensors: whether
    it is still the original one."""
    if ux is not None:
        yield (ux, w, None), (False, True, False)
    if uw is not None or ub is not None:
        yield (x, torch.zeros_like(w) if uw is None else uw, ub), (True, False, False)


def _score_terms(tensors: Any, along: Any) -> Iterator[Any]:
    (xq, xk, wq, wk, bq, bk), (uxq, uxk, uwq, uwk, ubq, ubk) = tensors, along
    for (x, w, b), (own_x, own_w, own_b) in _projection_terms(xq, wq, bq, uxq, uwq, ubq):
        yield (x, xk, w, wk, b, bk), (own_x, True, own_w, True, own_b, True)
    for (x, w, b), (own_x, own_w, own_b) in _projection_terms(xk, wk, bk, uxk, uwk, ubk):
        yield (xq, x, wq, w, bq, b), (True, own_x, True, own_w, True, own_b)


def _mix_terms(tensors: Any, along: Any) -> Iterator[Any]:
    (a, x, w, b), (ua, ux, uw, ub) = tensors, along
    if ua is not None:
        yield (ua, x, w, b), (False, True, True, True)
    for operand, own in _projection_terms(x, w, b, ux, uw, ub):
        yield (a, *operand), (True, *own)


def _absent_scores(s: Tensor, heads: int, scale: float, layout: str, backend: str) -> Any:
    parsed = Layout.parse(layout)
    return None if parsed.full else parsed.index_on(s.device) < 0


_ops = torch.ops.translution
batched(_scores, batch_arguments=(0, 1))
batched(_scores_backward, batch_arguments=())
batched(_mix, batch_arguments=(0, 1))
batched(_mix_backward, batch_arguments=())
scores = multilinear(
    _ops.offset_scores, _ops.offset_scores_backward, 6, _score_terms, _absent_scores
)
mix = multilinear(_ops.offset_mix, _ops.offset_mix_backward, 4, _mix_terms)
