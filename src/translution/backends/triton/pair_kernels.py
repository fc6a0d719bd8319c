"""The kernel that projects the pairs of a class: scores, and the gradients of projected rows.

For each pair (i, j) of class c, sample and head it computes q = x_i Wq[c] + bq[c] and
k = x_j Wk[c] + bk[c], and from them what is wanted of

    s  = scale · q · k                the score
    dq = scale · ds · k               the gradient of q, from the gradient ds of the score
    dk = scale · ds · q               the gradient of k

The mix has the same form. With the gradient dy of the output in place of q (without a table) and v
in place of k, s is da = dy · v, and with a in place of ds, dk is dv = a · dy.

A program takes BLOCK_M rows of one class. It gathers their query and key tokens, multiplies them by
the matrices of the class for several heads at once, and reduces both in registers. In the forward
pass no projected row is therefore written to memory. (The plain way, a projected query and key for
every pair, would write and read 2 · batch · pairs · columns numbers.) In the backward pass dq and
dk are written for a few classes at a time; `token_kernels` and `class_kernels` sum them.

Shapes in comments: R rows (BLOCK_M), N columns (N1 or N2), k channels of a step (BLOCK_K). See
`tile_math` for the names, and for why there are two blocks of columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile_math import columns_of_heads, load, multiply, split_heads

__all__ = ["pair_products"]


@triton.jit
def _project(
    x, offset, valid, w, bias, cls, n1, mask1, n2, mask2, channels, inner,
    HAS_W: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x[rows] W[class] + bias[class], or x[rows] without a table: [R, N1] and [R, N2]."""
    if HAS_W:
        y1 = tl.zeros((BLOCK_M, N1), SUMS)
        if N2 > 0:
            y2 = tl.zeros((BLOCK_M, N2), SUMS)
        matrix = w + cls.to(tl.int64) * channels * inner
        for start in range(0, channels, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            k_mask = k < channels
            r = load(
                x + offset[:, None] + k[None, :], valid[:, None], k_mask[None, :], True, not EVEN_K
            )
            m = load(
                matrix + k[:, None] * inner + n1[None, :], k_mask[:, None], mask1[None, :],
                not EVEN_K, not EVEN_N,
            )  # fmt: skip
            y1 = multiply(r, m, y1, SUMS, PRECISION, UPCAST)
            if N2 > 0:
                m = load(
                    matrix + k[:, None] * inner + n2[None, :], k_mask[:, None], mask2[None, :],
                    not EVEN_K, not EVEN_N,
                )  # fmt: skip
                y2 = multiply(r, m, y2, SUMS, PRECISION, UPCAST)
        if HAS_BIAS:
            y1 += tl.load(bias + cls * inner + n1, mask=mask1, other=0.0).to(SUMS)[None, :]
            if N2 > 0:
                y2 += tl.load(bias + cls * inner + n2, mask=mask2, other=0.0).to(SUMS)[None, :]
    else:
        y1 = load(
            x + offset[:, None] + n1[None, :], valid[:, None], mask1[None, :], True, not EVEN_N
        ).to(SUMS)
        if N2 > 0:
            y2 = load(
                x + offset[:, None] + n2[None, :], valid[:, None], mask2[None, :], True, not EVEN_N
            ).to(SUMS)
    if N2 > 0:
        return y1, y2
    else:
        return y1, y1


@triton.jit
def _score(
    q, k, s, cell, head, heads, cells, valid, scale,
    SUMS: tl.constexpr, BLOCK_M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write scale · q · k of each row and head to s[cell + head · cells]; q and k are [R, N]."""
    h = head + tl.arange(0, N // D)
    dots = tl.sum(split_heads(q.to(SUMS) * k, BLOCK_M, N, D), 2) * scale
    tl.store(
        s + cell[:, None] + h[None, :] * cells, dots.to(s.dtype.element_ty),
        mask=valid[:, None] & (h[None, :] < heads),
    )  # fmt: skip


@triton.jit
def _write_gradient(
    y, ds, rows, cell, at, column, exists, head, heads, cells, valid, scale,
    EVEN_N: tl.constexpr,
    SUMS: tl.constexpr, BLOCK_M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write scale · ds · y to rows[at]: y [R, N] times the ds of the row and of each head."""
    h = head + tl.arange(0, N // D)
    k_mask = valid[:, None] & (h[None, :] < heads)
    up = tl.load(ds + cell[:, None] + h[None, :] * cells, mask=k_mask, other=0.0).to(SUMS) * scale
    y = tl.reshape(split_heads(y.to(SUMS), BLOCK_M, N, D) * up[:, :, None], (BLOCK_M, N))
    mask = valid[:, None]
    if not EVEN_N:
        mask = mask & exists[None, :]
    tl.store(rows + at[:, None] + column[None, :], y.to(rows.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["batch", "n_queries", "n_keys", "heads", "width", "first_row", "parts"],
    do_not_specialize_on_alignment=["tiles"],
)
def pair_products(
    xq, xk, wq, wk, bq, bk, query, key, tiles, s, ds, to_q, to_k,
    batch, n_queries, n_keys, channels_q, channels_k, inner, heads, width, scale, first_row,
    parts,
    HAS_WQ: tl.constexpr, HAS_WK: tl.constexpr, HAS_BQ: tl.constexpr, HAS_BK: tl.constexpr,
    SCORE: tl.constexpr, TO_Q: tl.constexpr, TO_K: tl.constexpr, ONE_LOOP: tl.constexpr,
    EVEN_Q: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, TIGHT: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, LONG: tl.constexpr,
    BLOCK_M: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs: tile · part of the heads. `tiles` [tiles, 3] is (class, first row, last row + 1).

    SCORE writes s, [batch, heads, queries, keys]. TO_Q writes dq of each row to
    to_q[row - first_row], and TO_K writes dk to to_k; `ds` is of the shape of s.

    ONE_LOOP computes q and k in one loop over the channels of both, so that the loads for k begin
    while q is still being multiplied. It needs two tables with equally many channels and without
    biases. It is faster for some sizes and slower for others: `blocks` says for which it is used.
    """
    # The parts of one tile run at the same time and gather the same rows, which are then in the
    # GPU's cache.
    tile = tl.program_id(0) // parts
    head1 = (tl.program_id(0) % parts) * ((N1 + N2) // D)
    head2 = head1 + N1 // D
    cls = tl.load(tiles + 3 * tile)
    row = tl.load(tiles + 3 * tile + 1) + tl.arange(0, BLOCK_M)
    valid = row < tl.load(tiles + 3 * tile + 2)
    pair = row // batch
    b = row - pair * batch
    i = tl.load(query + pair, mask=valid, other=0)
    j = tl.load(key + pair, mask=valid, other=0)
    cells = (n_queries * n_keys).to(tl.int64)
    cell = b.to(tl.int64) * heads * cells + i * n_keys + j
    n1, mask1 = columns_of_heads(head1, heads, width, N1, D, TIGHT)
    if N2 > 0:
        n2, mask2 = columns_of_heads(head2, heads, width, N2, D, TIGHT)
    else:
        n2, mask2 = n1, mask1
    if LONG:
        offset_q = (b * n_queries + i).to(tl.int64) * channels_q
        offset_k = (b * n_keys + j).to(tl.int64) * channels_k
        at = (row - first_row).to(tl.int64) * inner
    else:
        offset_q = (b * n_queries + i) * channels_q
        offset_k = (b * n_keys + j) * channels_k
        at = (row - first_row) * inner
    if ONE_LOOP:
        q1 = tl.zeros((BLOCK_M, N1), xq.dtype.element_ty)
        k1 = tl.zeros((BLOCK_M, N1), SUMS)
        if N2 > 0:
            q2 = tl.zeros((BLOCK_M, N2), xq.dtype.element_ty)
            k2 = tl.zeros((BLOCK_M, N2), SUMS)
        steps = channels_q // BLOCK_K
        jump = cls.to(tl.int64) * channels_q * inner
        for step in range(0, 2 * steps):
            if step >= steps:
                x = xk
                matrix = wk + jump
                start = (step - steps) * BLOCK_K
            else:
                x = xq
                matrix = wq + jump
                start = step * BLOCK_K
            c = start + tl.arange(0, BLOCK_K)
            offset = tl.where(step >= steps, offset_k, offset_q)
            r = tl.load(x + offset[:, None] + c[None, :], mask=valid[:, None], other=0.0)
            m = load(
                matrix + c[:, None] * inner + n1[None, :], c[:, None] >= 0, mask1[None, :], False,
                not EVEN_N,
            )  # fmt: skip
            k1 = multiply(r, m, k1, SUMS, PRECISION, UPCAST)
            if N2 > 0:
                m = load(
                    matrix + c[:, None] * inner + n2[None, :], c[:, None] >= 0, mask2[None, :],
                    False, not EVEN_N,
                )  # fmt: skip
                k2 = multiply(r, m, k2, SUMS, PRECISION, UPCAST)
            if step == steps - 1:  # q is complete; the sums start again, for k
                q1 = k1.to(xq.dtype.element_ty)
                k1 = tl.zeros((BLOCK_M, N1), SUMS)
                if N2 > 0:
                    q2 = k2.to(xq.dtype.element_ty)
                    k2 = tl.zeros((BLOCK_M, N2), SUMS)
                if TO_K:
                    _write_gradient(
                        q1, ds, to_k, cell, at, n1, mask1, head1, heads, cells, valid, scale,
                        EVEN_N, SUMS, BLOCK_M, N1, D,
                    )  # fmt: skip
                    if N2 > 0:
                        _write_gradient(
                            q2, ds, to_k, cell, at, n2, mask2, head2, heads, cells, valid, scale,
                            EVEN_N, SUMS, BLOCK_M, N2, D,
                        )  # fmt: skip
    else:
        if SCORE or TO_K:
            q1, q2 = _project(
                xq, offset_q, valid, wq, bq, cls, n1, mask1, n2, mask2, channels_q, inner,
                HAS_WQ, HAS_BQ, EVEN_Q, EVEN_N, SUMS, PRECISION, UPCAST, BLOCK_M, N1, N2, BLOCK_K,
            )  # fmt: skip
            # q is kept in the dtype of the tokens while k is computed: half the registers
            q1 = q1.to(xq.dtype.element_ty)
            if N2 > 0:
                q2 = q2.to(xq.dtype.element_ty)
            if TO_K:
                _write_gradient(
                    q1, ds, to_k, cell, at, n1, mask1, head1, heads, cells, valid, scale, EVEN_N,
                    SUMS, BLOCK_M, N1, D,
                )  # fmt: skip
                if N2 > 0:
                    _write_gradient(
                        q2, ds, to_k, cell, at, n2, mask2, head2, heads, cells, valid, scale,
                        EVEN_N, SUMS, BLOCK_M, N2, D,
                    )  # fmt: skip
        if SCORE or TO_Q:
            k1, k2 = _project(
                xk, offset_k, valid, wk, bk, cls, n1, mask1, n2, mask2, channels_k, inner,
                HAS_WK, HAS_BK, EVEN_K, EVEN_N, SUMS, PRECISION, UPCAST, BLOCK_M, N1, N2, BLOCK_K,
            )  # fmt: skip
    if TO_Q:
        _write_gradient(
            k1, ds, to_q, cell, at, n1, mask1, head1, heads, cells, valid, scale, EVEN_N, SUMS,
            BLOCK_M, N1, D,
        )  # fmt: skip
        if N2 > 0:
            _write_gradient(
                k2, ds, to_q, cell, at, n2, mask2, head2, heads, cells, valid, scale, EVEN_N, SUMS,
                BLOCK_M, N2, D,
            )  # fmt: skip
    if SCORE:
        _score(q1, k1, s, cell, head1, heads, cells, valid, scale, SUMS, BLOCK_M, N1, D)
        if N2 > 0:
            _score(q2, k2, s, cell, head2, heads, cells, valid, scale, SUMS, BLOCK_M, N2, D)
