"""Attention over the k×k neighbourhood of each position of a map, and mixing by given weights.

The plain way copies the k² neighbours of every query. Neither function here does so. The attention
is checked and registered with torch in this file, and a backend computes it, one tile of queries at
a time. Mixing, and the logarithms of the attention's sums, are computed in this file, one tap of
the kernel at a time: the neighbours of all queries at one tap are a strided view of the map.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import backends
from .._renamed import foreign_arguments
from ..backends.torch.neighborhood import as_map, empty_positions
from ..layouts import Sizes
from ..neighborhoods import Neighborhood
from .offset import autocast, check_backend
from .offset_operators import HALF

__all__ = ["neighborhood_attention", "neighborhood_mix"]


@overload
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sizes,
    stride: Sizes = ...,
    dilation: Sizes = ...,
    scale: float | None = ...,
    *,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sizes,
    stride: Sizes = ...,
    dilation: Sizes = ...,
    scale: float | None = ...,
    *,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@foreign_arguments(
    is_causal="SelfAttention with causal=True and a window: neighbourhoods are on both sides",
    additional_keys="return_lse=True, to merge it with attention to further keys",
)
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    scale: float | None = None,
    *,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query over its k×k neighbourhood, with reflection at the borders.

    y_i = Σ_j softmax_j(scale · q_i · k_j) v_j for j over the neighbours of i
    (`translution.neighborhoods.Neighborhood` defines which positions these are).

    Args:
        query: [batch, heads, out height, out width, head_dim], where the size of the output is
            size / stride, rounded up.
        key: [batch, heads, height, width, head_dim].
        value: [batch, heads, height, width, value channels].
        kernel_size: the size of the neighbourhood, odd. Like `stride` and `dilation`, an int or
            (rows, columns).
        stride: the distance from one query to the next.
        dilation: the distance from one neighbour to the next.
        scale: the factor on the scores. None is 1 / sqrt(head_dim).
        backend: "auto", or the name of one in `translution.backends`.
        return_lse: also return log Σ_j exp(scale · q_i · k_j), as `masked_softmax` does. It is
            computed in plain torch beside any backend, one tap of the kernel at a time.

    Returns:
        [batch, heads, out height, out width, value channels] in the dtype of the values. For half
        precision, scores and sums are computed in float32. With `return_lse` also the logarithms
        [batch, heads, out height, out width], in float32 for half precision.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """
    query, key, value = autocast(query), autocast(key), autocast(value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 5 or not x.dtype.is_floating_point or x.dtype != query.dtype:
            raise ValueError(
                f"{name}: got {x.dtype} of shape {tuple(x.shape)}, want {query.dtype} of shape "
                "(batch, heads, height, width, channels)"
            )
    area = Neighborhood.of(_size("key", key.shape[2:4]), kernel_size, stride, dilation)
    want = (*key.shape[:2], *area.out, key.shape[4])
    if query.shape != want:
        raise ValueError(f"query: got shape {tuple(query.shape)}, want {tuple(want)}")
    if value.shape[:4] != key.shape[:4]:
        raise ValueError(f"value: got shape {tuple(value.shape)}, want {tuple(key.shape[:4])}, any")
    factor = key.shape[4] ** -0.5 if scale is None else float(scale)
    check_backend(backend, query)
    options = area.kernel, area.stride, area.dilation, factor, backend
    y: Tensor = _derivatives().attention(query, key, value, *options)
    return (y, _derivatives().logsumexp(query, key, *options)) if return_lse else y


def neighborhood_mix(
    weights: Tensor, value: Tensor, kernel_size: Sizes, stride: Sizes = 1, dilation: Sizes = 1
) -> Tensor:
    """The weighted sum over each k×k neighbourhood, with a given weight per query, tap and group.

    y[c, i] = Σ_t weights[c mod groups, t, i] · value[c, neighbour t of i], where neighbours outside
    of the map are reflected at its borders.

    Args:
        weights: [batch, groups, taps, out height, out width], with taps = rows · columns of the
            kernel, and the size of the output = size / stride, rounded up.
        value: [batch, channels, height, width], where channels is a multiple of groups.
        kernel_size: the size of the neighbourhood, odd. Like `stride` and `dilation`, an int or
            (rows, columns).
        stride: the distance from one query to the next.
        dilation: the distance from one neighbour to the next.

    Returns:
        [batch, channels, out height, out width].

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """
    if value.ndim != 4 or not value.dtype.is_floating_point:
        raise ValueError(
            f"value: got {value.dtype} of shape {tuple(value.shape)}, want floating point of shape "
            "(batch, channels, height, width)"
        )
    area = Neighborhood.of(_size("value", value.shape[2:]), kernel_size, stride, dilation)
    groups = weights.shape[1] if weights.ndim == 5 else 0
    want = (value.shape[0], groups, area.taps, *area.out)
    if weights.shape != want or weights.dtype != value.dtype:
        raise ValueError(
            f"weights: got {weights.dtype} of shape {tuple(weights.shape)}, want {value.dtype} of "
            f"shape (batch {want[0]}, groups, taps {want[2]}, {want[3]}, {want[4]})"
        )
    if not groups or value.shape[1] % groups:
        raise ValueError(
            f"weights: got {groups} groups, want a divisor of the {value.shape[1]} channels"
        )
    return _derivatives().mix(weights, value, area.kernel, area.stride, area.dilation)


def _derivatives() -> Any:
    from . import neighborhood_derivatives  # which needs the operators below

    return neighborhood_derivatives


def _size(name: str, shape: torch.Size) -> tuple[int, int]:
    """Height and width as ints, so that tracing makes them constants here.

    Raises:
        ValueError: the map has no position. The message contains `name`.
    """
    height, width = (int(n) for n in shape)
    if min(height, width) < 1:
        raise ValueError(f"{name}: got a map of {height}×{width}, want at least 1×1")
    return height, width


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in HALF else x.dtype


# -- The attention as an operator that is registered with torch; a backend computes it -----------


def _area(size, kernel, stride, dilation) -> Neighborhood:  # type: ignore[no-untyped-def]
    return Neighborhood(tuple(size), tuple(kernel), tuple(stride), tuple(dilation))


@torch.library.custom_op("translution::neighborhood_attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    scale: float,
    backend: str,
) -> Tensor:
    chosen = backends.choose(backend, query.device, query.dtype)
    area = _area(key.shape[2:4], kernel, stride, dilation)
    return chosen.neighborhood_attention(query, key, value, area, scale)


@_attention.register_fake
def _(query, key, value, kernel, stride, dilation, scale, backend):  # type: ignore[no-untyped-def]
    return as_map(empty_positions(query, value.shape[4]), tuple(query.shape[2:4]))


@torch.library.custom_op("translution::neighborhood_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    y: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = backends.choose(backend, query.device, query.dtype)
    area = _area(key.shape[2:4], kernel, stride, dilation)
    return chosen.neighborhood_attention_backward(grad, y, query, key, value, area, scale)


@_attention_backward.register_fake
def _(grad, y, query, key, value, kernel, stride, dilation, scale, backend):  # type: ignore[no-untyped-def]
    maps = (query, key, value)
    return tuple(as_map(empty_positions(x, x.shape[4]), tuple(x.shape[2:4])) for x in maps)


def _save_attention(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.kernel, ctx.stride, ctx.dilation, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(output, *tensors)


def _backward_attention(ctx, grad):  # type: ignore[no-untyped-def]
    grads = torch.ops.translution.neighborhood_attention_backward(
        grad, *ctx.saved_tensors, ctx.kernel, ctx.stride, ctx.dilation, ctx.scale, ctx.backend
    )
    return (*grads, None, None, None, None, None)


_attention.register_autograd(_backward_attention, setup_context=_save_attention)


# -- Mixing, one tap at a time, as an operator that is registered with torch ----------------------


class _Taps:
    """The map continued over its borders by reflection, and its view at each tap.

    On the continued map the neighbours of all queries at one tap are equally spaced, so that they
    are a strided view, and nothing is copied per tap.
    """

    def __init__(self, area: Neighborhood, device: torch.device):
        self.area = area
        self.lines = [torch.tensor(area.line(axis), device=device) for axis in (0, 1)]

    def extend(self, x: Tensor) -> Tensor:
        """Continue a map [batch, channels, height, width] over its borders."""
        return x.index_select(2, self.lines[0]).index_select(3, self.lines[1])

    def extend_backward(self, x: Tensor) -> Tensor:
        """The gradient of a map from that of the continued map."""
        for axis in (1, 0):
            shape = list(x.shape)
            shape[2 + axis] = self.area.size[axis]
            x = x.new_zeros(shape).index_add_(2 + axis, self.lines[axis], x)
        return x

    def view(self, extended: Tensor, tap: int) -> Tensor:
        """The neighbour of each query at a tap: a view [batch, channels, out height, out width]."""
        slices = []
        for axis, t in enumerate(divmod(tap, self.area.kernel[1])):
            start, step = t * self.area.dilation[axis], self.area.stride[axis]
            slices.append(slice(start, start + step * (self.area.out[axis] - 1) + 1, step))
        return extended[:, :, slices[0], slices[1]]


@torch.library.custom_op("translution::neighborhood_mix", mutates_args=())
def _mix(
    weights: Tensor, value: Tensor, kernel: list[int], stride: list[int], dilation: list[int]
) -> Tensor:
    area = _area(value.shape[2:], kernel, stride, dilation)
    taps = _Taps(area, value.device)
    groups, extended = weights.shape[1], taps.extend(value)
    dtype = _sum_dtype(value)
    # [batch, channels of a group, groups, out height, out width]
    y = value.new_zeros((value.shape[0], value.shape[1] // groups, groups, *area.out), dtype=dtype)
    for tap in range(area.taps):
        neighbors = taps.view(extended, tap).unflatten(1, (-1, groups))
        y.addcmul_(neighbors.to(dtype), weights[:, None, :, tap].to(dtype))
    return y.flatten(1, 2).to(value.dtype)


@_mix.register_fake
def _(weights, value, kernel, stride, dilation):  # type: ignore[no-untyped-def]
    return value.new_empty((*value.shape[:2], *weights.shape[3:]))


@torch.library.custom_op("translution::neighborhood_mix_backward", mutates_args=())
def _mix_backward(
    grad: Tensor,
    weights: Tensor,
    value: Tensor,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor]:
    area = _area(value.shape[2:], kernel, stride, dilation)
    taps = _Taps(area, value.device)
    groups, extended = weights.shape[1], taps.extend(value)
    dtype = _sum_dtype(value)
    dy = grad.unflatten(1, (-1, groups))  # [batch, channels of a group, groups, height, width]
    d_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    d_extended = torch.zeros_like(extended, dtype=dtype)
    for tap in range(area.taps):
        neighbors = taps.view(extended, tap).unflatten(1, (-1, groups))
        d_weights[:, :, tap] = (dy * neighbors).sum(1, dtype=dtype)
        d_neighbors = taps.view(d_extended, tap).unflatten(1, (-1, groups))
        d_neighbors.addcmul_(dy.to(dtype), weights[:, None, :, tap].to(dtype))
    return d_weights, taps.extend_backward(d_extended).to(value.dtype)


@_mix_backward.register_fake
def _(grad, weights, value, kernel, stride, dilation):  # type: ignore[no-untyped-def]
    return weights.new_empty(weights.shape), value.new_empty(value.shape)


def _save_mix(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.kernel, ctx.stride, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


def _backward_mix(ctx, grad):  # type: ignore[no-untyped-def]
    grads = torch.ops.translution.neighborhood_mix_backward(
        grad, *ctx.saved_tensors, ctx.kernel, ctx.stride, ctx.dilation
    )
    return (*grads, None, None, None)


_mix.register_autograd(_backward_mix, setup_context=_save_mix)


# -- The logarithms of the attention's sums, one tap at a time, as an operator of torch ------------


@torch.library.custom_op("translution::neighborhood_logsumexp", mutates_args=())
def _logsumexp(
    query: Tensor,
    key: Tensor,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    scale: float,
    backend: str,  # of the gradients
) -> Tensor:
    area = _area(key.shape[2:4], kernel, stride, dilation)
    taps = _Taps(area, key.device)
    q = query.to(_sum_dtype(query)).movedim(4, 2) * scale
    extended = taps.extend(key.movedim(4, 2).flatten(1, 2))
    lse = q.new_full((*query.shape[:2], *area.out), float("-inf"))
    for tap in range(area.taps):
        neighbors = taps.view(extended, tap).unflatten(1, (query.shape[1], -1))
        torch.logaddexp(lse, (q * neighbors).sum(2), out=lse)
    return lse


@_logsumexp.register_fake
def _(query, key, kernel, stride, dilation, scale, backend):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape[:4], dtype=_sum_dtype(query))


def _save_logsumexp(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, *ctx.options = inputs
    ctx.save_for_backward(query, key)


def _backward_logsumexp(ctx, grad):  # type: ignore[no-untyped-def]
    ops = torch.ops.translution
    attention = ops.neighborhood_attention, ops.neighborhood_attention_backward
    grads = _derivatives().logsumexp_gradient(grad, *ctx.saved_tensors, ctx.options, *attention)
    return (*grads, None, None, None, None, None)


_logsumexp.register_autograd(_backward_logsumexp, setup_context=_save_logsumexp)
