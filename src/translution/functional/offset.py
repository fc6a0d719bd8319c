"""The two primitives that every operator of the family is made of.

`offset_scores` gives one number per (pair, batch, head), `offset_mix` the weighted sum over the
keys. Each projection is shared by all pairs or differs by class (a table). The classes of the pairs
come from a `Layout`. With tables, q, k and v of a pair exist only while its class is computed, in
both directions: nothing of size tokens² x channels is ever held.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .. import backends
from ..layouts import Layout

__all__ = ["masked_softmax", "offset_mix", "offset_scores"]


def offset_scores(
    x_query: Tensor,
    x_key: Tensor,
    w_query: Tensor | None,
    w_key: Tensor | None,
    layout: Layout | str,
    *,
    heads: int = 1,
    bias_query: Tensor | None = None,
    bias_key: Tensor | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Scores s_ij = scale · (x_i Wq[c] + bq[c]) · (x_j Wk[c] + bk[c]) with c the class of (i, j).

    Args:
        x_query: [batch, queries, channels].
        x_key: [batch, keys, channels].
        w_query, w_key: a table [classes, channels, heads · head_dim]; or one matrix for all pairs
            [channels, heads · head_dim]; or None where the tokens are projected already.
        layout: the `Layout` of these queries and keys (or its `key`).
        heads: heads that the projected channels are divided into.
        bias_query, bias_key: [classes, heads · head_dim] beside a table, [heads · head_dim] beside
            one matrix.
        scale: a factor on every score.
        backend: "auto", or the name of one in `translution.backends`.

    Returns:
        [batch, heads, queries, keys], -inf where the pair is absent; float32 for half precision
        tokens (the sums are taken in it), else the dtype of the tokens.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """
    layout = Layout.parse(layout) if isinstance(layout, str) else layout
    x_query, x_key = autocast(x_query), autocast(x_key)
    _check_tokens("x_query", x_query, layout.n_queries)
    _check_tokens("x_key", x_key, layout.n_keys)
    if x_query.shape[0] != x_key.shape[0]:
        raise ValueError(
            f"x_key: got a batch of {x_key.shape[0]}, want that of x_query, {x_query.shape[0]}"
        )
    x_query, wq, bq = _shared("query", x_query, w_query, bias_query, layout)
    x_key, wk, bk = _shared("key", x_key, w_key, bias_key, layout)
    if x_query.dtype != x_key.dtype:
        raise ValueError(f"x_key: got {x_key.dtype}, want that of x_query, {x_query.dtype}")
    inner_query, inner_key = (
        (x if w is None else w).shape[-1] for x, w in ((x_query, wq), (x_key, wk))
    )
    if inner_query != inner_key:
        raise ValueError(
            f"w_key: projects to {inner_key} channels, want those of the query, {inner_query}"
        )
    if heads < 1 or inner_query % heads:
        raise ValueError(f"heads: got {heads}, want a divisor of the {inner_query} channels")
    if wq is None and wk is None:
        q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (x_query, x_key))
        s = (q * scale) @ k.transpose(-1, -2)
        if s.dtype in HALF:
            s = s.float()
        return s if layout.full else s.masked_fill(_absent(s, layout), float("-inf"))
    chosen = check_backend(backend, x_query)
    if chosen is not None:
        chosen.prepare_scores(x_query, x_key, wq, wk, bq, bk, heads, layout)
    return torch.ops.translution.offset_scores(
        x_query, x_key, wq, wk, bq, bk, heads, float(scale), layout.key, backend
    )


def offset_mix(
    a: Tensor,
    x_value: Tensor,
    w_value: Tensor | None,
    layout: Layout | str,
    *,
    bias_value: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The mix y_i = Σ_j a_ij (x_j Wv[c] + bv[c]) with c the class of (i, j), per head.

    Args:
        a: weights [batch, heads, queries, keys]; those of absent pairs are not looked at.
        x_value: [batch, keys, channels].
        w_value: a table [classes, channels, heads · head_dim]; or one matrix for all pairs; or None
            where the tokens are projected already.
        layout: the `Layout` of these queries and keys (or its `key`).
        bias_value: [classes, heads · head_dim] beside a table, [heads · head_dim] beside a matrix.
        backend: "auto", or the name of one in `translution.backends`.

    Returns:
        [batch, queries, heads · head_dim] in the dtype of the tokens.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """
    layout = Layout.parse(layout) if isinstance(layout, str) else layout
    x_value = autocast(x_value)
    _check_tokens("x_value", x_value, layout.n_keys)
    want = (x_value.shape[0], layout.n_queries, layout.n_keys)
    if a.ndim != 4 or (a.shape[0], *a.shape[2:]) != want:
        raise ValueError(
            f"a: got shape {tuple(a.shape)}, want (batch {want[0]}, heads, queries {want[1]}, "
            f"keys {want[2]})"
        )
    x_value, w, b = _shared("value", x_value, w_value, bias_value, layout)
    heads = a.shape[1]
    inner = (x_value if w is None else w).shape[-1]
    if heads < 1 or inner % heads:
        raise ValueError(f"a: got {heads} heads, want a divisor of the {inner} channels of v")
    if w is None:
        if not layout.full:
            a = a.masked_fill(_absent(a, layout), 0.0)
        v = x_value.unflatten(-1, (heads, -1)).transpose(1, 2)
        return (a.to(v.dtype) @ v).transpose(1, 2).flatten(2)
    chosen = check_backend(backend, x_value)
    if chosen is not None:
        chosen.prepare_mix(a, x_value, w, b, layout)
    return torch.ops.translution.offset_mix(a, x_value, w, b, layout.key, backend)


def masked_softmax(s: Tensor, mask: Tensor | None = None, empty_rows: bool = False) -> Tensor:
    """Softmax over the keys; a row that may look nowhere yields zeros, not NaN.

    Args:
        s: scores [batch, heads, queries, keys], -inf where a pair is absent.
        mask: boolean, True = may look, broadcastable to the scores.
        empty_rows: rows may be all -inf even without a mask.

    Returns:
        weights of the shape and dtype of the scores, each row's sum 1 or 0.
    """
    if mask is not None:
        s = s.masked_fill(~mask, float("-inf"))
    if mask is None and not empty_rows:
        return s.softmax(-1)
    nowhere = s.isneginf().all(-1, keepdim=True)
    return s.masked_fill(nowhere, 0.0).softmax(-1).masked_fill(nowhere, 0.0)


HALF = (torch.float16, torch.bfloat16)


def autocast(x: Tensor) -> Tensor:
    """The tokens in autocast's dtype. Tables stay as they are and are cast class by class."""
    kind = x.device.type
    known = torch.amp.autocast_mode.is_autocast_available(kind)
    if known and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def check_backend(backend: str, x: Tensor) -> ModuleType | None:
    """The backend that will serve; refused before anything runs if it cannot.

    None while torch.compile traces, which cannot look for packages and devices: the operator then
    chooses when it runs.
    """
    return None if torch.compiler.is_compiling() else backends.choose(backend, x.device, x.dtype)


def _check_tokens(name: str, x: Tensor, tokens: int) -> None:
    if x.ndim != 3 or x.shape[1] != tokens:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, want (batch, {tokens}, channels)")
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name}: got {x.dtype}, want a floating point dtype")


def _shared(
    side: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Take a shared projection now, as (projected tokens, None, None); keep a relative one."""
    if weight is None:
        if bias is not None:
            raise ValueError(f"bias_{side}: needs w_{side}")
        return x, None, None
    classes = layout.classes if weight.ndim == 3 else None
    head = "(" if classes is None else f"(classes {classes}, "
    if weight.ndim not in (2, 3) or (
        weight.shape[-2] != x.shape[-1] or (classes is not None and len(weight) != classes)
    ):
        raise ValueError(
            f"w_{side}: got shape {tuple(weight.shape)}, want {head}channels {x.shape[-1]}, "
            "heads * head_dim)"
        )
    if bias is not None and bias.shape != (*weight.shape[:-2], weight.shape[-1]):
        raise ValueError(
            f"bias_{side}: got shape {tuple(bias.shape)}, want {head}{weight.shape[-1]})"
        )
    if classes is not None:
        return x, weight, bias
    x = x @ weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype), None, None


def _absent(like: Tensor, layout: Layout) -> Tensor:
    return torch.ops.translution.layout_index(like, layout.key) < 0


# -- the operators as torch knows them: opaque to tracing, their layout a string -----------------


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
    chosen = backends.choose(backend, xq.device, xq.dtype)
    return chosen.scores(xq, xk, wq, wk, bq, bk, heads, scale, Layout.parse(layout))


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
    chosen = backends.choose(backend, xq.device, xq.dtype)
    parsed = Layout.parse(layout)
    return chosen.scores_backward(grad, xq, xk, wq, wk, bq, bk, heads, scale, parsed, wanted)


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
    chosen = backends.choose(backend, x.device, x.dtype)
    return chosen.mix(a, x, w, b, Layout.parse(layout))


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
    chosen = backends.choose(backend, x.device, x.dtype)
    return chosen.mix_backward(grad, a, x, w, b, Layout.parse(layout), wanted)


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
