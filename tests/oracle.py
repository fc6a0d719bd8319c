"""A slow and obvious implementation of every operator, in float64 and pair by pair.

The library never imports this file, and this file never imports the library, so that both cannot
have the same mistake.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def offset_class(
    query: int | tuple,
    key: int | tuple,
    *,
    grid: tuple[int, ...],
    causal: bool = False,
    window: tuple | None = None,
    dilation: tuple | None = None,
    prefix: int = 0,
    prefix_queries: bool = False,
) -> int:
    """The class of one pair, or -1. A token is an int (a prefix token) or its position on the grid.

    There are no buckets here.
    """
    axes = len(grid)
    window = window or (None,) * axes
    dilation = dilation or (1,) * axes
    sides = []
    for size, w, r in zip(grid, window, dilation, strict=True):
        reach = (size - 1) // r
        sides.append(reach if w is None else min(reach, w))
    spans = [s + 1 if causal else 2 * s + 1 for s in sides]
    offsets = 0 if prefix_queries else math.prod(spans)
    if isinstance(query, int) and isinstance(key, int):
        return offsets + query * prefix + key
    if isinstance(query, int):
        return -1 if causal else offsets + prefix**2 + query
    if isinstance(key, int):
        return offsets + prefix**2 + (0 if causal else prefix) + key
    cls = 0
    for i, j, side, span, r in zip(query, key, sides, spans, dilation, strict=True):
        step, rest = divmod(i - j, r)
        if rest or abs(step) > side or (causal and step < 0):
            return -1
        cls = cls * span + (step if causal else step + side)
    return cls


def index(input_grid: tuple[int, ...] | None = None, **layout) -> Tensor:
    """The `offset_class` of every pair, [queries, keys]."""
    positions = list(itertools.product(*(range(n) for n in input_grid or layout["grid"])))
    prefix = list(range(layout.get("prefix", 0)))
    tokens = prefix + positions
    queries = prefix if layout.get("prefix_queries") else tokens
    return torch.tensor([[offset_class(q, k, **layout) for k in tokens] for q in queries])


def project(x: Tensor, cls: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x [batch, channels] times a matrix, or times that of a class in a table."""
    if weight is None:
        return x
    if weight.ndim == 3:
        weight, bias = weight[cls], None if bias is None else bias[cls]
    y = x @ weight
    return y if bias is None else y + bias


def scores(xq, xk, wq, wk, index, heads, bq=None, bk=None, scale=1.0) -> Tensor:
    """Scores pair by pair, [batch, heads, queries, keys]; -inf where a pair is absent."""
    rows = []
    for i, j in itertools.product(*map(range, index.shape)):
        cls = int(index[i, j])
        if cls < 0:
            rows.append(torch.full((len(xq), heads), -math.inf, dtype=xq.dtype))
            continue
        q = project(xq[:, i], cls, wq, bq).unflatten(-1, (heads, -1))
        k = project(xk[:, j], cls, wk, bk).unflatten(-1, (heads, -1))
        rows.append((q * k).sum(-1) * scale)
    return torch.stack(rows, -1).unflatten(-1, tuple(index.shape))


def mix(a, x, w, index, b=None) -> Tensor:
    """The weighted sum pair by pair, [batch, queries, heads * head_dim]."""
    heads, out = a.shape[1], []
    for i in range(index.shape[0]):
        total = 0
        for j in range(index.shape[1]):
            cls = int(index[i, j])
            if cls >= 0:
                v = project(x[:, j], cls, w, b).unflatten(-1, (heads, -1))
                total = total + a[:, :, i, j, None] * v
        out.append(total.flatten(1))
    return torch.stack(out, 1)


def softmax(s: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over the last axis. A row without any key gets zeros."""
    e = s.exp() if mask is None else s.exp() * mask
    total = e.sum(-1, keepdim=True)
    return torch.where(total > 0, e / total.clamp(min=1e-300), torch.zeros_like(e))


def rotate(x: Tensor, positions: list[tuple[int, ...] | None]) -> Tensor:
    """Rotate x [batch, heads, tokens, head_dim] by positions; None leaves a token as it is."""
    d = x.shape[-1]
    out = x.clone()
    for t, position in enumerate(positions):
        if position is None:
            continue
        each = d // 2 // len(position)
        for axis, place in enumerate(position):
            for p in range(each):
                a, b = axis * each + p, axis * each + p + d // 2
                angle = place * 10000.0 ** (-2 * p / (2 * each))
                cos, sin = math.cos(angle), math.sin(angle)
                out[:, :, t, a] = x[:, :, t, a] * cos - x[:, :, t, b] * sin
                out[:, :, t, b] = x[:, :, t, b] * cos + x[:, :, t, a] * sin
    return out


def reflect(place: int, size: int) -> int:
    """Walk from 0 as many steps as the position says, turning round at both ends of the line."""
    inside, direction = 0, 1
    for _ in range(abs(place) if size > 1 else 0):
        if not 0 <= inside + direction < size:
            direction = -direction
        inside += direction
    return inside


def local_attention(q, k, v, kernel: int, stride: int, dilation: int) -> Tensor:
    """Attention of each query over its neighbourhood, position by position.

    q, k and v are [batch, heads, head_dim, height, width], the result [batch, heads, head_dim, out
    height, out width]. Scores are divided by sqrt(head_dim).
    """
    height, width = k.shape[3:]
    reach = (kernel - 1) // 2
    steps = [dilation * t for t in range(-reach, reach + 1)]
    rows = []
    for y in range(0, height, stride):
        for x in range(0, width, stride):
            places = [
                (reflect(y + dy, height), reflect(x + dx, width)) for dy in steps for dx in steps
            ]
            s = torch.stack([(q[..., y, x] * k[..., a, b]).sum(-1) for a, b in places], -1)
            weights = softmax(s / math.sqrt(q.shape[2]))
            values = torch.stack([v[..., a, b] for a, b in places], -1)
            rows.append((weights[:, :, None] * values).sum(-1))
    out = len(range(0, height, stride)), len(range(0, width, stride))
    return torch.stack(rows, -1).unflatten(-1, out)


def convolution_path(slices, fc, fc_bias, shifts, bias, stride, dilation, grouped_order=False):
    """The convolution path of ACmix, position by position.

    slices [batch, slices, channels, height, width], fc [taps, slices] and shifts [channels * each,
    taps, k, k] give [batch, each * channels, out height, out width].
    """
    batch, _, channels, height, width = slices.shape
    kernel = shifts.shape[-1]
    reach = (kernel - 1) // 2
    maps = torch.einsum("ts,bschw->btchw", fc, slices)
    if fc_bias is not None:
        maps = maps + fc_bias[:, None, None, None]
    each = len(shifts) // channels
    rows = []
    for y in range(0, height, stride):
        for x in range(0, width, stride):
            total = slices.new_zeros(batch, channels, each)
            for i, j in itertools.product(range(kernel), repeat=2):
                a, b = y + dilation * (i - reach), x + dilation * (j - reach)
                if 0 <= a < height and 0 <= b < width:
                    weight = shifts[..., i, j].unflatten(0, (channels, each))
                    total = total + torch.einsum("cot,btc->bco", weight, maps[..., a, b])
            total = total if grouped_order else total.transpose(1, 2)
            total = total.flatten(1)
            rows.append(total if bias is None else total + bias)
    out = len(range(0, height, stride)), len(range(0, width, stride))
    return torch.stack(rows, -1).unflatten(-1, out)
