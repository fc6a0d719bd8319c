"""Derivatives of neighbourhood attention and mixing: forward mode, second derivatives, and vmap.

Mixing is linear in each of its arguments, so `derivatives.multilinear` serves it. Attention is not,
because of its softmax. Its gradient is computed by a backend; its tangent, and what second
derivatives need, by plain gathers of k² keys and values per query. These are rarely used, and cost
the memory that the backends save. The derivatives of the logarithm of its sums are attention again:
that of lse_i with respect to q_i is scale times the attention whose values are the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..neighborhoods import Neighborhood
from .derivatives import Constants, batched, multilinear
from .offset_operators import HALF

__all__ = ["attention", "logsumexp", "logsumexp_gradient", "mix"]

_ops = torch.ops.translution


def _tangent(tensors: Any, along: Any, options: Any) -> Tensor:
    """The tangent of the attention along (uq, uk, uv), each of which may be None.

    With s = scale · q · k over the neighbours and a = softmax(s), it is Σ_j (t_j v_j + a_j uv_j),
    where t = a (us - Σ_j a_j us_j) is the tangent of a.
    """
    q, k, v = tensors
    kernel, stride, dilation, scale, _ = options.values
    area = Neighborhood(tuple(k.shape[2:4]), tuple(kernel), tuple(stride), tuple(dilation))
    index = area.index.to(k.device)  # [queries, taps]

    def neighbors(x: Tensor) -> Tensor:  # [batch, heads, queries, taps, channels]
        return x.flatten(2, 3)[:, :, index]

    uq, uk, uv = along
    query, keys, values = q.flatten(2, 3)[..., None, :], neighbors(k), neighbors(v)
    a = ((query * keys).sum(-1) * scale).softmax(-1)
    y = torch.zeros_like(values[..., 0, :])
    if uq is not None or uk is not None:
        us: Any = 0.0
        if uq is not None:
            us = us + (uq.flatten(2, 3)[..., None, :] * keys).sum(-1) * scale
        if uk is not None:
            us = us + (query * neighbors(uk)).sum(-1) * scale
        t = a * (us - (a * us).sum(-1, keepdim=True))
        y = y + (t[..., None] * values).sum(-2)
    if uv is not None:
        y = y + (a[..., None] * neighbors(uv)).sum(-2)
    return _as_map(y, area.out)


def _as_map(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """[batch, heads, positions, channels] as a map in the memory layout of the operators' results,
    which forward mode expects of a tangent."""
    return x.transpose(1, 2).contiguous().unflatten(1, size).permute(0, 3, 1, 2, 4)


def _second(g: Tensor, tensors: Any, along: Any, options: Any) -> tuple[Tensor, ...]:
    """The gradient of ⟨g, tangent⟩ with respect to q, k and v."""

    def tangent(*x: Tensor) -> Tensor:
        return _tangent(x, along, options)

    parts = torch.func.vjp(tangent, *tensors)[1](g)
    return tuple(_as_map(t.flatten(2, 3), tuple(t.shape[2:4])) for t in parts)


class _Attention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*given: Any) -> Tensor:
        *tensors, options = given
        return _ops.neighborhood_attention(*tensors, *options.values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.options = inputs[3]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output, *inputs[:3])
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:
            return (None,) * 4
        return *_Gradient.apply(grads[0], *ctx.saved_tensors, ctx.options), None

    @staticmethod
    def jvp(ctx: Any, *along: Any) -> Any:
        return _tangent(ctx.saved_tensors[-3:], along[:3], ctx.options)


class _Gradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*given: Any) -> tuple[Tensor, ...]:
        *tensors, options = given
        return _ops.neighborhood_attention_backward(*tensors, *options.values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.options = inputs[5]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        g, _, *tensors = ctx.saved_tensors
        to_g = _tangent(tensors, cotangents, ctx.options)
        parts = _second(g, tensors, cotangents, ctx.options)
        # y, the second input, is a function of the others: they have its part of the gradient
        return to_g, None, *parts, None

    @staticmethod
    def jvp(ctx: Any, *along: Any) -> Any:
        g, y, *tensors = ctx.saved_tensors
        parts = _second(g, tensors, along[2:5], ctx.options)
        if along[0] is None:
            return parts
        first = _Gradient.apply(along[0], y, *tensors, ctx.options)
        return tuple(a + b for a, b in zip(first, parts, strict=True))


class _LogSumExp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*given: Any) -> Tensor:
        query, key, options = given
        return _ops.neighborhood_logsumexp(query, key, *options.values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.options = inputs[2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:
            return None, None, None

        def gradient(*given: Any) -> Any:
            return _Gradient.apply(*given[:5], Constants(*given[5:]))

        query, key = ctx.saved_tensors
        of = ctx.options.values
        return *logsumexp_gradient(grads[0], query, key, of, attention, gradient), None

    @staticmethod
    def jvp(ctx: Any, *along: Any) -> Any:
        (query, key), (u_query, u_key), of = ctx.saved_tensors, along[:2], ctx.options.values
        total: Any = 0.0
        if u_query is not None:
            total = total + u_query * attention(query, key, key, *of)
        if u_key is not None:
            total = total + query * attention(query, key, u_key, *of)
        total = total.sum(-1) * of[3]
        return total if query.dtype not in HALF else total.float()


def logsumexp_gradient(
    g: Tensor, query: Tensor, key: Tensor, options: Any, attention: Any, gradient: Any
) -> tuple[Tensor, Tensor]:
    """The gradients of query and key from that of lse_i = log Σ_j exp(scale · q_i · k_j).

    With the attention weights a_ij, they are scale · g_i Σ_j a_ij k_j, the attention with keys as
    values, and Σ_i a_ij (scale · g_i q_i), which is the gradient of the values of that attention.

    Args:
        g: the gradient of lse.
        query, key, options: the arguments of the operator.
        attention, gradient: the attention and its gradient, as functions of all their arguments.
    """
    mean = attention(query, key, key, *options)
    up = g[..., None] * options[3]
    d_key = gradient((up * query).to(query.dtype), mean, query, key, key, *options)[2]
    return (up * mean).to(query.dtype), d_key


def _mix_terms(tensors: Any, along: Any) -> Iterator[Any]:
    (weights, value), (u_weights, u_value) = tensors, along
    if u_weights is not None:
        yield (u_weights, value), (False, True)
    if u_value is not None:
        yield (weights, u_value), (True, False)


def _mix_gradient(*given: Any) -> Any:
    *rest, _ = given  # both gradients are computed, whichever is wanted
    return _ops.neighborhood_mix_backward(*rest)


batched(_ops.neighborhood_attention.default, batch_arguments=(0, 1, 2))
batched(_ops.neighborhood_attention_backward.default, batch_arguments=(0, 1, 2, 3, 4))
batched(_ops.neighborhood_logsumexp.default, batch_arguments=(0, 1))
batched(_ops.neighborhood_mix.default, batch_arguments=(0, 1))
batched(_ops.neighborhood_mix_backward.default, batch_arguments=(0, 1, 2))

mix = multilinear(_ops.neighborhood_mix, _mix_gradient, 2, _mix_terms)


def attention(*given: Any) -> Tensor:
    """`translution::neighborhood_attention`, with all its derivatives."""
    if torch.compiler.is_compiling():
        return _ops.neighborhood_attention(*given)
    return _Attention.apply(*given[:3], Constants(*given[3:]))


def logsumexp(*given: Any) -> Tensor:
    """`translution::neighborhood_logsumexp`, with all its derivatives."""
    if torch.compiler.is_compiling():
        return _ops.neighborhood_logsumexp(*given)
    return _LogSumExp.apply(*given[:2], Constants(*given[2:]))
