"""The two primitives that every operator of the family is made of.

`offset_scores` gives one number per (pair, batch, head), and `offset_mix` the weighted sum over the
keys. Each projection is either shared by all pairs (one matrix) or differs from offset class to
offset class (a table, with one matrix per class). The class of a pair comes from a `Layout`. The
projected query, key and value of a pair exist only while its class is computed, in both directions:
nothing of size tokens² · channels is ever stored.

The functions here check their arguments, and apply shared projections as ordinary matrix products.
Tables go to operators that are registered with torch, which a backend computes.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal, overload

import torch
from torch import Tensor

from .. import backends
from ..layouts import Layout
from ..operands import Operand
from . import offset_operators as operators
from .offset_operators import HALF

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
    """Scores s_ij = scale · (x_i Wq[c] + bq[c]) · (x_j Wk[c] + bk[c]), c being the class of (i, j).

    This is the score of Translution, section 3, before its softmax.

    Args:
        x_query: [batch, queries, channels].
        x_key: [batch, keys, channels].
        w_query, w_key: a table [classes, channels, heads · head_dim]; or one matrix for all pairs
            [channels, heads · head_dim]; or None where the tokens are projected already.
        layout: the `Layout` of these queries and keys (or its `spec`).
        heads: the number of heads that the projected channels are divided into.
        bias_query, bias_key: [classes, heads · head_dim] beside a table, [heads · head_dim] beside
            one matrix.
        scale: a factor on every score.
        backend: "auto", or the name of one in `translution.backends`.

    Returns:
        [batch, heads, queries, keys], -inf where the pair is absent. The dtype is float32 for half
        precision tokens, and else that of the tokens. With a table, sums are taken in that dtype;
        without any, the product is torch's own in the dtype of the tokens, which in float16 can
        overflow as that of ordinary attention can.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """
    layout = Layout.parse(layout) if isinstance(layout, str) else layout
    query, key = Operand(x_query, w_query, bias_query), Operand(x_key, w_key, bias_key)
    return scores(query, key, layout, heads=heads, scale=scale, backend=backend)


def offset_mix(
    a: Tensor,
    x_value: Tensor,
    w_value: Tensor | None,
    layout: Layout | str,
    *,
    bias_value: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The weighted sum y_i = Σ_j a_ij (x_j Wv[c] + bv[c]) per head, c being the class of (i, j).

    This is the output of Translution, section 3, before its output projection.

    Args:
        a: weights [batch, heads, queries, keys]; those of absent pairs are not read.
        x_value: [batch, keys, channels].
        w_value: a table [classes, channels, heads · head_dim]; or one matrix for all pairs; or None
            where the tokens are projected already.
        layout: the `Layout` of these queries and keys (or its `spec`).
        bias_value: [classes, heads · head_dim] beside a table, [heads · head_dim] beside a matrix.
        backend: "auto", or the name of one in `translution.backends`.

    Returns:
        [batch, queries, heads · head_dim] in the dtype of the tokens.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """
    layout = Layout.parse(layout) if isinstance(layout, str) else layout
    return mix(a, Operand(x_value, w_value, bias_value), layout, backend=backend)


def scores(
    query: Operand,
    key: Operand,
    layout: Layout,
    *,
    heads: int = 1,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """`offset_scores` of two operands, whose weight may be one matrix as well as a table."""
    query = query._replace(x=autocast(query.x))
    key = key._replace(x=autocast(key.x))
    _check_tokens("x_query", query.x, layout.n_queries)
    _check_tokens("x_key", key.x, layout.n_keys)
    if query.x.shape[0] != key.x.shape[0]:
        raise ValueError(
            f"x_key: got a batch of {key.x.shape[0]}, want that of x_query, {query.x.shape[0]}"
        )
    query = _apply_shared_projection("query", query, layout)
    key = _apply_shared_projection("key", key, layout)
    if query.x.dtype != key.x.dtype:
        raise ValueError(f"x_key: got {key.x.dtype}, want that of x_query, {query.x.dtype}")
    if query.inner != key.inner:
        raise ValueError(
            f"w_key: projects to {key.inner} channels, want those of the query, {query.inner}"
        )
    if heads < 1 or query.inner % heads:
        raise ValueError(f"heads: got {heads}, want a divisor of the {query.inner} channels")
    if query.weight is None and key.weight is None:
        q, k = (side.x.unflatten(-1, (heads, -1)).transpose(1, 2) for side in (query, key))
        s = (q * scale) @ k.transpose(-1, -2)
        if s.dtype in HALF:
            s = s.float()
        return s if layout.full else s.masked_fill(_absent(s, layout), float("-inf"))
    chosen = check_backend(backend, query.x)
    if chosen is not None and not operators.shares_projections(layout, query, key, heads):
        chosen.prepare_scores(query, key, heads, layout)
    sides = query.x, key.x, query.weight, key.weight, query.bias, key.bias
    return operators.scores(*sides, heads, float(scale), layout.spec, backend)


def mix(a: Tensor, value: Operand, layout: Layout, *, backend: str = "auto") -> Tensor:
    """`offset_mix` of an operand, whose weight may be one matrix as well as a table."""
    value = value._replace(x=autocast(value.x))
    _check_tokens("x_value", value.x, layout.n_keys)
    want = (value.x.shape[0], layout.n_queries, layout.n_keys)
    if a.ndim != 4 or (a.shape[0], *a.shape[2:]) != want:
        raise ValueError(
            f"a: got shape {tuple(a.shape)}, want (batch {want[0]}, heads, queries {want[1]}, "
            f"keys {want[2]})"
        )
    value = _apply_shared_projection("value", value, layout)
    heads = a.shape[1]
    if heads < 1 or value.inner % heads:
        raise ValueError(f"a: got {heads} heads, want a divisor of the {value.inner} channels of v")
    if value.weight is None:
        if not layout.full:
            a = a.masked_fill(_absent(a, layout), 0.0)
        v = value.x.unflatten(-1, (heads, -1)).transpose(1, 2)
        return (a.to(v.dtype) @ v).transpose(1, 2).flatten(2)
    chosen = check_backend(backend, value.x)
    if chosen is not None and not operators.shares_projections(layout, None, value, heads):
        chosen.prepare_mix(a, value, layout)
    return operators.mix(a, *value, layout.spec, backend)


@overload
def masked_softmax(
    s: Tensor,
    mask: Tensor | None = ...,
    empty_rows: bool = ...,
    *,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def masked_softmax(
    s: Tensor, mask: Tensor | None = ..., empty_rows: bool = ..., *, return_lse: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def masked_softmax(
    s: Tensor, mask: Tensor | None = None, empty_rows: bool = False, *, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax over the keys. A query that sees no key gets zeros if there is a mask, or with
    `empty_rows`; otherwise NaN, as in torch's softmax.

    Args:
        s: scores [batch, heads, queries, keys], -inf where a pair is absent.
        mask: boolean, True where the query sees the key, broadcastable to the scores.
        empty_rows: whether a row may be all -inf even without a mask.
        return_lse: also return log Σ_j exp(s_ij), which merges attention over several sets of keys.
            If set p gives the mixed values y_p and the sums lse_p, then the whole has
            lse = log Σ_p exp(lse_p) and y = Σ_p exp(lse_p - lse) y_p.

    Returns:
        weights of the shape and dtype of the scores. Each row sums to 1, or to 0 if it is empty.
        With `return_lse` also the logarithms [batch, heads, queries]; -inf where a row is empty.
    """
    if mask is not None:
        s = s.masked_fill(~mask, float("-inf"))
    empty: Tensor | None = None
    if mask is not None or empty_rows:
        empty = s.isneginf().all(-1, keepdim=True)
        s = s.masked_fill(empty, 0.0)
    a = s.softmax(-1)
    a = a if empty is None else a.masked_fill(empty, 0.0)
    if not return_lse:
        return a
    lse = s.logsumexp(-1)
    return a, lse if empty is None else lse.masked_fill(empty[..., 0], float("-inf"))


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of x. (torch raises an error for the meta device.)"""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def autocast(x: Tensor) -> Tensor:
    """The tokens in autocast's dtype.

    Tables keep their dtype here; a backend casts the part of a table that it is about to use.
    """
    if x.dtype != torch.float64 and autocast_enabled(x):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def check_backend(backend: str, x: Tensor) -> ModuleType | None:
    """The backend that will compute an operator on x.

    While torch.compile traces, this is None: tracing cannot search for packages and devices, so the
    operator chooses its backend when it runs.

    Raises:
        ValueError: the backend is unknown or cannot compute with this dtype on this device.
    """
    return None if torch.compiler.is_compiling() else backends.choose(backend, x.device, x.dtype)


def _check_tokens(name: str, x: Tensor, tokens: int) -> None:
    if x.ndim != 3 or x.shape[1] != tokens:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, want (batch, {tokens}, channels)")
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name}: got {x.dtype}, want a floating point dtype")


def _apply_shared_projection(side: str, operand: Operand, layout: Layout) -> Operand:
    """Apply a projection that all pairs share. What is left to apply is a table, or nothing."""
    x, weight, bias = operand
    if weight is None:
        if bias is not None:
            raise ValueError(f"bias_{side}: needs w_{side}")
        return operand
    classes = layout.classes if weight.ndim == 3 else None
    shape_start = "(" if classes is None else f"(classes {classes}, "
    if weight.ndim not in (2, 3) or (
        weight.shape[-2] != x.shape[-1] or (classes is not None and len(weight) != classes)
    ):
        raise ValueError(
            f"w_{side}: got shape {tuple(weight.shape)}, want {shape_start}channels {x.shape[-1]}, "
            "heads * head_dim)"
        )
    if bias is not None and bias.shape != (*weight.shape[:-2], weight.shape[-1]):
        raise ValueError(
            f"bias_{side}: got shape {tuple(bias.shape)}, want {shape_start}{weight.shape[-1]})"
        )
    if classes is not None:
        return operand
    x = x @ weight.to(x.dtype)
    return Operand(x if bias is None else x + bias.to(x.dtype))


def _absent(like: Tensor, layout: Layout) -> Tensor:
    return operators.layout_index(like, layout) < 0
