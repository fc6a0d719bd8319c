"""The Triton kernels of neighbourhood attention: one tile of queries, or of keys, per program.

The plain way gathers each key and value k² times and multiplies single rows; scores and weights go
through memory between the steps. Here a program holds a tile of queries (the rows), walks the few
keys that any of them sees (the others) a block at a time, and does with each block what flash
attention does: scores, running maximum and sum, and mix, with nothing written but the answer. Which
key is a neighbour of which query, and how often by reflection, is a small table of counts: exp(s)
is multiplied by the count, which is exact, and a count of 0 leaves the pair out.

Going back, `attend_to_queries` is the same walk: the gradient of a query is a sum over its keys
that can be rescaled with the running maximum just as the answer is, so that no second pass over the
keys is needed. It also writes two numbers per query, the logarithm of the sum and what softmax's
derivative subtracts. With them `attend_to_keys` walks the other way round: a program holds a tile
of keys and walks the queries that see any of them. Each number is thus summed by one program in one
order, without atomics and without partial sums in memory: equal inputs give equal bits.

Maps come as [batch, places, heads, channels], contiguous. What differs from batch to batch and from
map to map (sizes, numbers of tiles and blocks) is an ordinary argument that nothing is compiled
for. SUMS, PRECISION and UPCAST are those of `tile_math`. Logarithms are to the base 2, and `scale`
holds the factor log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile_math import load, multiply

__all__ = ["attend", "attend_to_keys", "attend_to_queries"]

SIZES = ["queries", "keys", "heads", "tiles", "blocks"]
"""Arguments that nothing is compiled for."""


@triton.jit
def _program(heads, tiles):
    """(sample, head, tile) of this program: heads beside each other read the same lines."""
    program = tl.program_id(0)
    head = program % heads
    program = program // heads
    return (program // tiles).to(tl.int64), head, program % tiles


@triton.jit
def _rows(
    x, at, fine, heads, channels, MASK_ROWS: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr
):
    """x [places, heads, channels] at one head: [rows, C], zeros where there is nothing."""
    c = tl.arange(0, C)
    where = x + (at * heads)[:, None] * channels + c[None, :]
    return load(where, fine[:, None], (c < channels)[None, :], MASK_ROWS, not EVEN)


@triton.jit
def _store(x, at, fine, heads, channels, y, C: tl.constexpr):
    c = tl.arange(0, C)
    where = x + (at * heads)[:, None] * channels + c[None, :]
    mask = fine[:, None] & (c < channels)[None, :]
    tl.store(where, y.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _scores(
    a, b,
    ROWS: tl.constexpr, OTHERS: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """a bᵀ: [ROWS, OTHERS]."""
    none = tl.zeros((ROWS, OTHERS), SUMS)
    return multiply(a, tl.trans(b), none, SUMS, PRECISION, UPCAST)


@triton.jit
def _counts(times, tile, slot, width, ROWS: tl.constexpr):
    """times [tiles, ROWS, width] of this tile at some slots: [ROWS, slots]."""
    row = tile * ROWS + tl.arange(0, ROWS)
    return tl.load(times + (row * width)[:, None] + slot[None, :])


@triton.jit
def _weights(s, n, top, SUMS: tl.constexpr):
    """One more block of scores s that count n times: (exp2(s - top) n, the new top, and what sums
    taken with the old top are to be multiplied by)."""
    s = tl.where(n > 0, s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1))
    # a query may have met none of its keys yet: -inf - -inf would be no number
    base = tl.where(new == float("-inf"), 0.0, new)
    return tl.exp2(s - base[:, None]) * n.to(SUMS), new, tl.exp2(top - base)


@triton.jit(do_not_specialize=SIZES)
def attend(
    query, key, value, y, rows, others, times,
    queries, keys, heads, tiles, blocks, dim, channels, scale,
    EVEN_DIM: tl.constexpr, EVEN_CHANNELS: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, OTHERS: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y of a tile of queries. Programs: sample · tile · head."""
    sample, head, tile = _program(heads, tiles)
    query += (sample * queries * heads + head) * dim
    key += (sample * keys * heads + head) * dim
    value += (sample * keys * heads + head) * channels
    y += (sample * queries * heads + head) * channels
    row = tl.load(rows + tile * ROWS + tl.arange(0, ROWS))
    fine = row >= 0
    width = blocks * OTHERS
    q = _rows(query, row, fine, heads, dim, True, DIM, EVEN_DIM)
    top = tl.full((ROWS,), float("-inf"), SUMS)
    total = tl.zeros((ROWS,), SUMS)
    answer = tl.zeros((ROWS, CHANNELS), SUMS)
    for block in range(0, blocks):
        slot = block * OTHERS + tl.arange(0, OTHERS)
        at = tl.load(others + tile * width + slot)
        k = _rows(key, at, fine, heads, dim, False, DIM, EVEN_DIM)
        v = _rows(value, at, fine, heads, channels, False, CHANNELS, EVEN_CHANNELS)
        n = _counts(times, tile, slot, width, ROWS)
        s = _scores(q, k, ROWS, OTHERS, SUMS, PRECISION, UPCAST) * scale
        weights, top, shrink = _weights(s, n, top, SUMS)
        total = total * shrink + tl.sum(weights, 1)
        answer *= shrink[:, None]
        answer = multiply(weights.to(v.dtype), v, answer, SUMS, PRECISION, UPCAST)
    total = tl.where(fine, total, 1.0)
    _store(y, row, fine, heads, channels, answer / total[:, None], CHANNELS)


@triton.jit(do_not_specialize=SIZES)
def attend_to_queries(
    query, key, value, y, grad, to_query, logs, along, rows, others, times,
    queries, keys, heads, tiles, blocks, dim, channels, scale, factor,
    EVEN_DIM: tl.constexpr, EVEN_CHANNELS: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, OTHERS: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries; and of each of them in `logs` the logarithm of Σ exp(s),
    in `along` grad · y, both [batch, heads, queries]. Programs: sample · tile · head.

    Σ_j a_ij (grad_i · v_j - grad_i · y_i) k_j, with a_ij = exp(s_ij) / Σ exp(s_i), is summed with
    exp(s_ij - top) in a's place and divided at the end.
    """
    sample, head, tile = _program(heads, tiles)
    query += (sample * queries * heads + head) * dim
    to_query += (sample * queries * heads + head) * dim
    key += (sample * keys * heads + head) * dim
    value += (sample * keys * heads + head) * channels
    y += (sample * queries * heads + head) * channels
    grad += (sample * queries * heads + head) * channels
    row = tl.load(rows + tile * ROWS + tl.arange(0, ROWS))
    fine = row >= 0
    width = blocks * OTHERS
    q = _rows(query, row, fine, heads, dim, True, DIM, EVEN_DIM)
    up = _rows(grad, row, fine, heads, channels, True, CHANNELS, EVEN_CHANNELS)
    given = _rows(y, row, fine, heads, channels, True, CHANNELS, EVEN_CHANNELS)
    dot = tl.sum(up.to(SUMS) * given.to(SUMS), 1)
    top = tl.full((ROWS,), float("-inf"), SUMS)
    total = tl.zeros((ROWS,), SUMS)
    answer = tl.zeros((ROWS, DIM), SUMS)
    for block in range(0, blocks):
        slot = block * OTHERS + tl.arange(0, OTHERS)
        at = tl.load(others + tile * width + slot)
        k = _rows(key, at, fine, heads, dim, False, DIM, EVEN_DIM)
        v = _rows(value, at, fine, heads, channels, False, CHANNELS, EVEN_CHANNELS)
        n = _counts(times, tile, slot, width, ROWS)
        s = _scores(q, k, ROWS, OTHERS, SUMS, PRECISION, UPCAST) * scale
        weights, top, shrink = _weights(s, n, top, SUMS)
        total = total * shrink + tl.sum(weights, 1)
        da = _scores(up, v, ROWS, OTHERS, SUMS, PRECISION, UPCAST)
        ds = weights * (da - dot[:, None])
        answer *= shrink[:, None]
        answer = multiply(ds.to(k.dtype), k, answer, SUMS, PRECISION, UPCAST)
    total = tl.where(fine, total, 1.0)
    _store(to_query, row, fine, heads, dim, answer * (factor / total)[:, None], DIM)
    cell = (sample * heads + head) * queries + row
    tl.store(logs + cell, top + tl.log2(total), mask=fine)
    tl.store(along + cell, dot, mask=fine)


@triton.jit(do_not_specialize=SIZES)
def attend_to_keys(
    query, key, value, grad, to_key, to_value, logs, along, rows, others, times,
    queries, keys, heads, tiles, blocks, dim, channels, scale, factor,
    EVEN_DIM: tl.constexpr, EVEN_CHANNELS: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, OTHERS: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and of their values, from `logs` and `along`; the rows are
    keys and the others queries. Programs: sample · tile · head."""
    sample, head, tile = _program(heads, tiles)
    query += (sample * queries * heads + head) * dim
    key += (sample * keys * heads + head) * dim
    to_key += (sample * keys * heads + head) * dim
    value += (sample * keys * heads + head) * channels
    to_value += (sample * keys * heads + head) * channels
    grad += (sample * queries * heads + head) * channels
    logs += (sample * heads + head) * queries
    along += (sample * heads + head) * queries
    row = tl.load(rows + tile * ROWS + tl.arange(0, ROWS))
    fine = row >= 0
    width = blocks * OTHERS
    k = _rows(key, row, fine, heads, dim, True, DIM, EVEN_DIM)
    v = _rows(value, row, fine, heads, channels, True, CHANNELS, EVEN_CHANNELS)
    dk = tl.zeros((ROWS, DIM), SUMS)
    dv = tl.zeros((ROWS, CHANNELS), SUMS)
    for block in range(0, blocks):
        slot = block * OTHERS + tl.arange(0, OTHERS)
        at = tl.load(others + tile * width + slot)
        q = _rows(query, at, fine, heads, dim, False, DIM, EVEN_DIM)
        up = _rows(grad, at, fine, heads, channels, False, CHANNELS, EVEN_CHANNELS)
        log = tl.load(logs + at)
        dot = tl.load(along + at)
        n = _counts(times, tile, slot, width, ROWS)
        s = _scores(k, q, ROWS, OTHERS, SUMS, PRECISION, UPCAST) * scale - log[None, :]
        weights = tl.exp2(tl.where(n > 0, s, float("-inf"))) * n.to(SUMS)
        dv = multiply(weights.to(up.dtype), up, dv, SUMS, PRECISION, UPCAST)
        da = _scores(v, up, ROWS, OTHERS, SUMS, PRECISION, UPCAST)
        ds = weights * (da - dot[None, :])
        dk = multiply(ds.to(q.dtype), q, dk, SUMS, PRECISION, UPCAST)
    _store(to_key, row, fine, heads, dim, dk * factor, DIM)
    _store(to_value, row, fine, heads, channels, dv, CHANNELS)
