"""The Triton kernels of attention over k×k neighbourhoods.

They compute, for each sample and head and for j over the neighbours of query i,

    s_ij = scale · q_i · k_j        a_i = softmax_j(s_i)        y_i = Σ_j a_ij v_j

and, with dy as the gradient of y, the gradients

    dv_j = Σ_i a_ij dy_i            ds_ij = a_ij (dy_i · v_j - dy_i · y_i)
    dq_i = scale · Σ_j ds_ij k_j    dk_j  = scale · Σ_i ds_ij q_i

The plain way copies the k² neighbours of every query, multiplies single rows, and writes scores and
weights to memory between the steps. Here a program takes a tile of queries (its *rows*) and walks
over the few keys that any of them has as a neighbour (the *others*), one block at a time. Like
flash attention, it keeps a running maximum and a running sum of the softmax, and writes nothing but
the result. Which key is a neighbour of which query, and how often (reflection at the borders may
make it so several times), is a small table of counts: exp(s) is multiplied by the count, which is
exact, and a count of 0 removes the pair.

The backward pass consists of two kernels. `attend_to_queries` is the same walk as `attend`. dq_i is
a sum over the keys of query i that can be rescaled with the running maximum, just as y_i can. So it
needs one pass over the keys, not one for the softmax and a second for the gradient. It also writes
two numbers per query: the logarithm of its softmax's sum, and dy_i · y_i. With these,
`attend_to_keys` walks in the other direction: a program takes a tile of keys (its rows) and walks
over the queries (the others) that have any of them as a neighbour.

Because each direction has tiles of its own, each number is summed by one program in one order. The
plain way, one walk over tiles of queries for all gradients, would have to add the gradients of keys
that several tiles share: by atomics, whose order and therefore bits differ from run to run, or by
writing partial sums in float32 and reading them again.

Tensors are [batch, positions, heads, channels], contiguous. Shapes in comments are those of a
program: R rows, O others of a block, D head_dim and C value channels (both padded to powers of
two). Sizes that differ from batch to batch and from map to map are arguments for which nothing is
compiled (`SIZES`). SUMS, PRECISION and UPCAST are explained in `tile_math`. Exponentials and
logarithms have base 2, which the hardware computes directly; `scale` therefore contains the factor
log2(e), while `factor` is the scale alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile_math import load, multiply

__all__ = ["attend", "attend_to_keys", "attend_to_queries"]

SIZES = ["queries", "keys", "heads", "tiles", "blocks"]
"""Arguments for whose values nothing is compiled."""


@triton.jit
def _program(heads, tiles):
    """The sample, head and tile of this program.

    Heads are the fast axis, because heads of the same positions are next to each other in memory.
    """
    program = tl.program_id(0)
    head = program % heads
    program = program // heads
    return (program // tiles).to(tl.int64), head, program % tiles


@triton.jit
def _load_rows(
    x, position, valid, heads, channels,
    MASK_ROWS: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Gather x [positions, heads, channels] of one head at some positions: [rows, C].

    Rows that are not valid (with MASK_ROWS) and channels that do not exist are zero.
    """
    c = tl.arange(0, C)
    pointers = x + (position * heads)[:, None] * channels + c[None, :]
    return load(pointers, valid[:, None], (c < channels)[None, :], MASK_ROWS, not EVEN)


@triton.jit
def _store_rows(x, position, valid, heads, channels, y, C: tl.constexpr):
    """Write y [rows, C] to x [positions, heads, channels] of one head at some positions."""
    c = tl.arange(0, C)
    pointers = x + (position * heads)[:, None] * channels + c[None, :]
    mask = valid[:, None] & (c < channels)[None, :]
    tl.store(pointers, y.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _products(
    a, b,
    ROWS: tl.constexpr, OTHERS: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """a bᵀ: [R, channels], [O, channels] -> [R, O]."""
    zeros = tl.zeros((ROWS, OTHERS), SUMS)
    return multiply(a, tl.trans(b), zeros, SUMS, PRECISION, UPCAST)


@triton.jit
def _load_counts(counts, tile, slot, width, ROWS: tl.constexpr):
    """counts [tiles, ROWS, width] of one tile at some slots: [R, O]."""
    row = tile * ROWS + tl.arange(0, ROWS)
    return tl.load(counts + (row * width)[:, None] + slot[None, :])


@triton.jit
def _softmax_step(s, n, top, SUMS: tl.constexpr):
    """Add one block of scores to a running softmax.

    Arguments: the scores s [R, O], their counts n [R, O], and the maximum `top` [R] so far.

    Returns the terms n · exp2(s - new maximum), the new maximum, and the factor by which sums of
    earlier terms have to be multiplied.
    """
    s = tl.where(n > 0, s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1))
    # A query may not have had any neighbour yet. Its maximum is -inf, and -inf - -inf is NaN.
    base = tl.where(new == float("-inf"), 0.0, new)
    return tl.exp2(s - base[:, None]) * n.to(SUMS), new, tl.exp2(top - base)


@triton.jit(do_not_specialize=SIZES)
def attend(
    query, key, value, y, rows, others, counts,
    queries, keys, heads, tiles, blocks, dim, channels, scale,
    EVEN_DIM: tl.constexpr, EVEN_CHANNELS: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, OTHERS: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write y for a tile of queries. Programs: sample · tile · head."""
    sample, head, tile = _program(heads, tiles)
    query += (sample * queries * heads + head) * dim
    key += (sample * keys * heads + head) * dim
    value += (sample * keys * heads + head) * channels
    y += (sample * queries * heads + head) * channels
    row = tl.load(rows + tile * ROWS + tl.arange(0, ROWS))  # positions of the queries, [R]
    valid = row >= 0
    width = blocks * OTHERS
    q = _load_rows(query, row, valid, heads, dim, True, DIM, EVEN_DIM)  # [R, D]
    top = tl.full((ROWS,), float("-inf"), SUMS)
    total = tl.zeros((ROWS,), SUMS)
    result = tl.zeros((ROWS, CHANNELS), SUMS)
    for block in range(0, blocks):
        slot = block * OTHERS + tl.arange(0, OTHERS)
        other = tl.load(others + tile * width + slot)  # positions of the keys, [O]
        k = _load_rows(key, other, valid, heads, dim, False, DIM, EVEN_DIM)  # [O, D]
        v = _load_rows(value, other, valid, heads, channels, False, CHANNELS, EVEN_CHANNELS)
        n = _load_counts(counts, tile, slot, width, ROWS)
        s = _products(q, k, ROWS, OTHERS, SUMS, PRECISION, UPCAST) * scale  # [R, O]
        weights, top, shrink = _softmax_step(s, n, top, SUMS)
        total = total * shrink + tl.sum(weights, 1)
        result *= shrink[:, None]
        result = multiply(weights.to(v.dtype), v, result, SUMS, PRECISION, UPCAST)  # [R, C]
    total = tl.where(valid, total, 1.0)
    _store_rows(y, row, valid, heads, channels, result / total[:, None], CHANNELS)


@triton.jit(do_not_specialize=SIZES)
def attend_to_queries(
    query, key, value, y, dy, dq, logs, dots, rows, others, counts,
    queries, keys, heads, tiles, blocks, dim, channels, scale, factor,
    EVEN_DIM: tl.constexpr, EVEN_CHANNELS: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, OTHERS: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write dq for a tile of queries, and two numbers per query. Programs: sample · tile · head.

    The numbers, [batch, heads, queries] each, are `logs`, the logarithm of Σ_j exp(s_ij), and
    `dots`, dy_i · y_i.

    dq_i = factor · Σ_j a_ij (dy_i · v_j - dy_i · y_i) k_j is summed with exp(s_ij - top) in place
    of a_ij, rescaled whenever the maximum `top` grows, and divided by the sum of the softmax at the
    end.
    """
    sample, head, tile = _program(heads, tiles)
    query += (sample * queries * heads + head) * dim
    dq += (sample * queries * heads + head) * dim
    key += (sample * keys * heads + head) * dim
    value += (sample * keys * heads + head) * channels
    y += (sample * queries * heads + head) * channels
    dy += (sample * queries * heads + head) * channels
    row = tl.load(rows + tile * ROWS + tl.arange(0, ROWS))  # positions of the queries, [R]
    valid = row >= 0
    width = blocks * OTHERS
    q = _load_rows(query, row, valid, heads, dim, True, DIM, EVEN_DIM)  # [R, D]
    row_dy = _load_rows(dy, row, valid, heads, channels, True, CHANNELS, EVEN_CHANNELS)  # [R, C]
    row_y = _load_rows(y, row, valid, heads, channels, True, CHANNELS, EVEN_CHANNELS)  # [R, C]
    dot = tl.sum(row_dy.to(SUMS) * row_y.to(SUMS), 1)
    top = tl.full((ROWS,), float("-inf"), SUMS)
    total = tl.zeros((ROWS,), SUMS)
    result = tl.zeros((ROWS, DIM), SUMS)
    for block in range(0, blocks):
        slot = block * OTHERS + tl.arange(0, OTHERS)
        other = tl.load(others + tile * width + slot)  # positions of the keys, [O]
        k = _load_rows(key, other, valid, heads, dim, False, DIM, EVEN_DIM)  # [O, D]
        v = _load_rows(value, other, valid, heads, channels, False, CHANNELS, EVEN_CHANNELS)
        n = _load_counts(counts, tile, slot, width, ROWS)
        s = _products(q, k, ROWS, OTHERS, SUMS, PRECISION, UPCAST) * scale  # [R, O]
        weights, top, shrink = _softmax_step(s, n, top, SUMS)
        total = total * shrink + tl.sum(weights, 1)
        da = _products(row_dy, v, ROWS, OTHERS, SUMS, PRECISION, UPCAST)  # [R, O]
        ds = weights * (da - dot[:, None])
        result *= shrink[:, None]
        result = multiply(ds.to(k.dtype), k, result, SUMS, PRECISION, UPCAST)  # [R, D]
    total = tl.where(valid, total, 1.0)
    _store_rows(dq, row, valid, heads, dim, result * (factor / total)[:, None], DIM)
    cell = (sample * heads + head) * queries + row
    tl.store(logs + cell, top + tl.log2(total), mask=valid)
    tl.store(dots + cell, dot, mask=valid)


@triton.jit(do_not_specialize=SIZES)
def attend_to_keys(
    query, key, value, dy, dk, dv, logs, dots, rows, others, counts,
    queries, keys, heads, tiles, blocks, dim, channels, scale, factor,
    EVEN_DIM: tl.constexpr, EVEN_CHANNELS: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, OTHERS: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write dk and dv for a tile of keys. Programs: sample · tile · head.

    The rows are keys and the others are queries. `logs` and `dots` are what `attend_to_queries`
    wrote. They give a_ij = exp(s_ij - logs_i) and ds_ij without a running softmax.
    """
    sample, head, tile = _program(heads, tiles)
    query += (sample * queries * heads + head) * dim
    key += (sample * keys * heads + head) * dim
    dk += (sample * keys * heads + head) * dim
    value += (sample * keys * heads + head) * channels
    dv += (sample * keys * heads + head) * channels
    dy += (sample * queries * heads + head) * channels
    logs += (sample * heads + head) * queries
    dots += (sample * heads + head) * queries
    row = tl.load(rows + tile * ROWS + tl.arange(0, ROWS))  # positions of the keys, [R]
    valid = row >= 0
    width = blocks * OTHERS
    k = _load_rows(key, row, valid, heads, dim, True, DIM, EVEN_DIM)  # [R, D]
    v = _load_rows(value, row, valid, heads, channels, True, CHANNELS, EVEN_CHANNELS)  # [R, C]
    sum_dk = tl.zeros((ROWS, DIM), SUMS)
    sum_dv = tl.zeros((ROWS, CHANNELS), SUMS)
    for block in range(0, blocks):
        slot = block * OTHERS + tl.arange(0, OTHERS)
        other = tl.load(others + tile * width + slot)  # positions of the queries, [O]
        q = _load_rows(query, other, valid, heads, dim, False, DIM, EVEN_DIM)  # [O, D]
        other_dy = _load_rows(dy, other, valid, heads, channels, False, CHANNELS, EVEN_CHANNELS)
        log = tl.load(logs + other)
        dot = tl.load(dots + other)
        n = _load_counts(counts, tile, slot, width, ROWS)
        s = _products(k, q, ROWS, OTHERS, SUMS, PRECISION, UPCAST) * scale - log[None, :]  # [R, O]
        weights = tl.exp2(tl.where(n > 0, s, float("-inf"))) * n.to(SUMS)
        sum_dv = multiply(weights.to(other_dy.dtype), other_dy, sum_dv, SUMS, PRECISION, UPCAST)
        da = _products(v, other_dy, ROWS, OTHERS, SUMS, PRECISION, UPCAST)  # [R, O]
        ds = weights * (da - dot[None, :])
        sum_dk = multiply(ds.to(q.dtype), q, sum_dk, SUMS, PRECISION, UPCAST)  # [R, D]
    _store_rows(dk, row, valid, heads, dim, sum_dk * factor, DIM)
    _store_rows(dv, row, valid, heads, channels, sum_dv, CHANNELS)
