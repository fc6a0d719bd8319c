"""The kernels for small tables, such as those of α-Translution (24 × 24 at rank 8 and three heads).

They compute the same as `pair_kernels`, `token_kernels` and `class_kernels`. For each pair (i, j)
of class c, with q = x_i Wq[c] + bq[c] and k = x_j Wk[c] + bk[c],

    scores             s = scale · q · k
    token gradients    dx_i = Σ over the pairs of i of scale · ds · k Wq[c]ᵀ   (dx_j likewise)
    table gradients    dWq[c] = Σ over the pairs of c of x_iᵀ (scale · ds · k)   (dWk likewise)

and the mix y_i = Σ over the pairs of i of a · v, in which v takes the place of k, with its
gradients.

With small tables the products are cheap, and the time is that of moving memory. The kernels for
wide tables write the gradient of each projected row, once per pair and sample, and read it twice,
once for its token and once for its class. Here, computing a row again is cheaper than that, so no
row is written at all. The matrix of a class is one tile. `pair_walk` computes scores, the mix and
the gradients of tokens while it walks over the classes of a token, and `class_tables` computes the
gradients of both tables of a class. The walk visits the other tokens of a token in their order, so
that scores and weights that are next to each other in memory are read or written at about the same
time.

Channels (K) and columns (N, heads · D) are padded to powers of two before the launch. Without
padding, a row of 24 channels would be loaded two bytes at a time under a mask. A row of 32
takes four loads of 16 bytes, without a mask.

Shapes in comments: R rows (BLOCK_M or BLOCK_R). See `tile_math` for the names.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .class_kernels import divide
from .tile_math import multiply, split_heads
from .token_kernels import rows_of_group

__all__ = ["class_tables", "pair_walk"]


@triton.jit
def _matrix(w, cls, K: tl.constexpr, N: tl.constexpr):
    """Load the matrix of a class: [K, N]."""
    k = tl.arange(0, K)
    n = tl.arange(0, N)
    return tl.load(w + cls.to(tl.int64) * K * N + k[:, None] * N + n[None, :])


@triton.jit
def _tokens(x, token, valid, LONG: tl.constexpr, K: tl.constexpr):
    """Load the tokens of the rows: [R, K]."""
    if LONG:
        token = token.to(tl.int64)
    cells = x + (token * K)[:, None] + tl.arange(0, K)[None, :]
    return tl.load(cells, mask=valid[:, None], other=0.0)


@triton.jit
def _project(
    r, w, bias, cls,
    HAS_W: tl.constexpr, HAS_BIAS: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """r W[class] + bias[class], or r itself without a table: [R, K] -> [R, N]."""
    if HAS_W:
        m = _matrix(w, cls, K, N)
        y = multiply(r, m, tl.zeros((BLOCK_M, N), SUMS), SUMS, PRECISION, UPCAST)
        if HAS_BIAS:
            y += tl.load(bias + cls * N + tl.arange(0, N)).to(SUMS)[None, :]
    else:
        y = r.to(SUMS)
    return y


@triton.jit
def _scale_heads(
    y, numbers, cell, valid, heads, cells, scale,
    SUMS: tl.constexpr, BLOCK_M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Multiply y [R, N] by scale · numbers[cell], one number per row and head."""
    h = tl.arange(0, N // D)
    mask = valid[:, None] & (h[None, :] < heads)
    factor = tl.load(numbers + cell[:, None] + h[None, :] * cells, mask=mask, other=0.0)
    factor = factor.to(SUMS) * scale
    return tl.reshape(split_heads(y, BLOCK_M, N, D) * factor[:, :, None], (BLOCK_M, N))


@triton.jit(
    do_not_specialize=[
        "batch", "part_batch", "parts", "size", "near_tokens", "far_tokens", "heads", "by_near",
        "by_far",
    ],
)  # fmt: skip
def pair_walk(
    near, far, w_near, w_far, bias_near, bias_far, numbers, out, members, classes, links, spans,
    batch, part_batch, parts, size, near_tokens, far_tokens, heads, by_near, by_far, scale,
    SCORE: tl.constexpr, NEAR_W: tl.constexpr, FAR_W: tl.constexpr,
    NEAR_BIAS: tl.constexpr, FAR_BIAS: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, LONG: tl.constexpr,
    BLOCK_M: tl.constexpr, K_NEAR: tl.constexpr, K_FAR: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Programs: (group of tokens · part of the batch, part of the entries).

    `near` are the tokens of the program's group, and `far` the tokens that they have pairs with:
    near are the queries and far the keys, or the other way round. `numbers` is
    [batch, heads, queries, keys]; by_near and by_far are its strides along near and far tokens.
    Entries, `classes`, `links` and `spans` are those of `token_kernels.token_sums`.

    SCORE writes numbers = scale · (near Wn + bn) · (far Wf + bf) per head. These are the scores; or
    the gradients of attention weights, if near are the gradients of the output, without a table.

    Without SCORE it writes out[part, b, near token] = Σ over its pairs of
    scale · numbers · (far Wf + bf) Wnᵀ. These are the gradients of tokens; or, without Wn, the mix.
    """
    group, member, b, token, valid = rows_of_group(
        members, size, batch, part_batch, parts, tl.program_id(0), BLOCK_M
    )
    begin = tl.load(spans + 2 * group)
    count = tl.load(spans + 2 * group + 1) - begin
    per_part = tl.cdiv(count, tl.num_programs(1))
    z = tl.program_id(1)
    begin += z * per_part
    end = begin + tl.minimum(per_part, count - z * per_part)
    cells = (near_tokens * far_tokens).to(tl.int64)
    cell = b.to(tl.int64) * heads * cells + token * by_near
    if SCORE:
        own = _tokens(near, b * near_tokens + token, valid, LONG, K_NEAR)
    else:
        total = tl.zeros((BLOCK_M, K_NEAR), SUMS)
    for entry in range(begin, end):
        cls = tl.load(classes + entry)
        link = tl.load(links + entry * size + member, mask=valid, other=-1)
        present = link >= 0
        other = _tokens(far, b * far_tokens + link, present, LONG, K_FAR)
        f = _project(
            other, w_far, bias_far, cls, FAR_W, FAR_BIAS, SUMS, PRECISION, UPCAST, BLOCK_M, K_FAR,
            N,
        )  # fmt: skip
        if SCORE:
            q = _project(
                own, w_near, bias_near, cls, NEAR_W, NEAR_BIAS, SUMS, PRECISION, UPCAST, BLOCK_M,
                K_NEAR, N,
            )  # fmt: skip
            h = tl.arange(0, N // D)
            dots = tl.sum(split_heads(q * f, BLOCK_M, N, D), 2) * scale
            tl.store(
                numbers + (cell + link * by_far)[:, None] + h[None, :] * cells,
                dots.to(numbers.dtype.element_ty), mask=present[:, None] & (h[None, :] < heads),
            )  # fmt: skip
        else:
            at = cell + link * by_far
            g = _scale_heads(f, numbers, at, present, heads, cells, scale, SUMS, BLOCK_M, N, D)
            if NEAR_W:
                m = _matrix(w_near, cls, K_NEAR, N)
                g = g.to(far.dtype.element_ty)
                total = multiply(g, tl.trans(m), total, SUMS, PRECISION, UPCAST)
            else:
                total += g
    if not SCORE:
        row = ((z * batch + b).to(tl.int64) * near_tokens + token) * K_NEAR
        tl.store(out + row[:, None] + tl.arange(0, K_NEAR)[None, :], total, mask=valid[:, None])


@triton.jit(
    do_not_specialize=["batch", "multiplier", "shift", "n_queries", "n_keys", "heads", "classes"]
)
def class_tables(
    xq, xk, wq, wk, bq, bk, ds, dwq, dwk, dbq, dbk, query, key, bounds,
    batch, multiplier, shift, n_queries, n_keys, heads, classes, scale,
    HAS_WQ: tl.constexpr, HAS_WK: tl.constexpr, HAS_BQ: tl.constexpr, HAS_BK: tl.constexpr,
    DWQ: tl.constexpr, DWK: tl.constexpr, DBQ: tl.constexpr, DBK: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, LONG: tl.constexpr,
    BLOCK_R: tl.constexpr, KQ: tl.constexpr, KK: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Programs: (class, part of its rows). Write the gradients of a class from a part of its rows:

    dwq[part, class] = Σ xqᵀ gq, dbq = Σ gq, with gq = scale · ds · (xk Wk + bk)
    dwk[part, class] = Σ xkᵀ gk, dbk = Σ gk, with gk = scale · ds · (xq Wq + bq)

    The caller adds up the parts. `bounds` says which pairs a class has, and multiplier and shift
    divide by the batch (`class_kernels.divide`).
    """
    cls = tl.program_id(0)
    z = tl.program_id(1)
    start = tl.load(bounds + cls) * batch
    stop = tl.load(bounds + cls + 1) * batch
    per_part = tl.cdiv(tl.cdiv(stop - start, tl.num_programs(1)), BLOCK_R) * BLOCK_R
    start += z * per_part
    stop = tl.minimum(stop, start + per_part)
    cells = (n_queries * n_keys).to(tl.int64)
    if DWQ:
        to_wq = tl.zeros((KQ, N), SUMS)
    if DWK:
        to_wk = tl.zeros((KK, N), SUMS)
    if DBQ:
        to_bq = tl.zeros((N,), SUMS)
    if DBK:
        to_bk = tl.zeros((N,), SUMS)
    for begin in range(start, stop, BLOCK_R):
        row = begin + tl.arange(0, BLOCK_R)
        valid = row < stop
        pair = divide(row, multiplier, shift)
        b = row - pair * batch
        i = tl.load(query + pair, mask=valid, other=0)
        j = tl.load(key + pair, mask=valid, other=0)
        cell = b.to(tl.int64) * heads * cells + i * n_keys + j
        tokens_q = _tokens(xq, b * n_queries + i, valid, LONG, KQ)
        tokens_k = _tokens(xk, b * n_keys + j, valid, LONG, KK)
        if DWQ or DBQ:
            k = _project(
                tokens_k, wk, bk, cls, HAS_WK, HAS_BK, SUMS, PRECISION, UPCAST, BLOCK_R, KK, N
            )
            g = _scale_heads(k, ds, cell, valid, heads, cells, scale, SUMS, BLOCK_R, N, D)
            if DBQ:
                to_bq += tl.sum(g, 0)
            if DWQ:
                g = g.to(tokens_q.dtype)
                to_wq = multiply(tl.trans(tokens_q), g, to_wq, SUMS, PRECISION, UPCAST)
        if DWK or DBK:
            q = _project(
                tokens_q, wq, bq, cls, HAS_WQ, HAS_BQ, SUMS, PRECISION, UPCAST, BLOCK_R, KQ, N
            )
            g = _scale_heads(q, ds, cell, valid, heads, cells, scale, SUMS, BLOCK_R, N, D)
            if DBK:
                to_bk += tl.sum(g, 0)
            if DWK:
                g = g.to(tokens_k.dtype)
                to_wk = multiply(tl.trans(tokens_k), g, to_wk, SUMS, PRECISION, UPCAST)
    at = (z * classes + cls).to(tl.int64)
    n = tl.arange(0, N)
    if DWQ:
        tl.store(dwq + at * KQ * N + tl.arange(0, KQ)[:, None] * N + n[None, :], to_wq)
    if DWK:
        tl.store(dwk + at * KK * N + tl.arange(0, KK)[:, None] * N + n[None, :], to_wk)
    if DBQ:
        tl.store(dbq + at * N + n, to_bq)
    if DBK:
        tl.store(dbk + at * N + n, to_bk)
