"""The Triton kernels: grouped matrix products over the pairs of a layout.

Three of them make both primitives and their gradients. None of them uses atomics: each number is
summed by one program in one order, so equal inputs give equal bits.

- `pair_scores`: a tile of pairs of one class, one head. Gathers their token rows, projects them by
  the matrix of the class, and multiplies query and key in the epilogue. Going back it stores what
  their product passes on to each side.
- `token_sums`: one token and a part of the batch. Sums over the token's pairs what a row of each
  gives through the matrix of its class.
- `class_outer`: one class. The sum over its pairs of the outer products that make its matrix's
  gradient.

Rows are (pair, batch) with the batch fastest. Nothing here is compiled before it is called. At the
first call for a size each kernel is timed with a few block sizes, and the best is kept. UPCAST
widens the operands of a product, for the interpreter, whose bfloat16 can't be multiplied.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

__all__ = ["class_outer", "pair_scores", "token_sums"]


def tuned(blocks: dict[str, Sequence[int]], key: Sequence[str], restore: Sequence[str] = ()) -> Any:
    """Times the combinations of block sizes, warps and stages at the first call for each `key`;
    arguments in `restore` are what a call adds to. In the interpreter there is one choice."""
    names, stages, warps = list(blocks), (3, 4), (4, 8)
    if triton.knobs.runtime.interpret:
        blocks, stages, warps = dict.fromkeys(names, (16,)), (1,), (4,)
    configs = [
        triton.Config(dict(zip(names, sizes, strict=True)), num_stages=s, num_warps=w)
        for *sizes, s, w in itertools.product(*(blocks[name] for name in names), stages, warps)
    ]
    return triton.autotune(configs, key=list(key), restore_value=list(restore))


@triton.jit
def _projected(
    x, w, bias, row, fine, cls, head, channels, inner, width,
    HAS_W: tl.constexpr, HAS_BIAS: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One head of x[row] W[cls] + bias[cls], or of x[row] itself: [BLOCK_M, BLOCK_D]."""
    d = tl.arange(0, BLOCK_D)
    column = head * width + d
    if HAS_W:
        y = tl.zeros((BLOCK_M, BLOCK_D), SUMS)
        matrix = w + cls.to(tl.int64) * channels * inner
        for start in range(0, channels, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            a = tl.load(
                x + row[:, None] * channels + k[None, :],
                mask=fine[:, None] & (k[None, :] < channels), other=0.0,
            )  # fmt: skip
            b = tl.load(
                matrix + k[:, None] * inner + column[None, :],
                mask=(k[:, None] < channels) & (d[None, :] < width), other=0.0,
            )  # fmt: skip
            b = b.to(a.dtype)
            if UPCAST:
                a = a.to(SUMS)
                b = b.to(SUMS)
            y = tl.dot(a, b, y, input_precision=PRECISION, out_dtype=SUMS)
        if HAS_BIAS:
            more = tl.load(bias + cls * inner + column, mask=d < width, other=0.0)
            y += more.to(SUMS)[None, :]
    else:
        y = tl.load(
            x + row[:, None] * inner + column[None, :],
            mask=fine[:, None] & (d[None, :] < width), other=0.0,
        ).to(SUMS)  # fmt: skip
    return y


@tuned(
    {"BLOCK_K": (32, 64)},
    ("channels_q", "channels_k", "inner", "width", "BLOCK_M", "TO_Q", "TO_K", "HAS_WQ", "HAS_WK"),
)
@triton.jit
def pair_scores(
    xq, xk, wq, wk, bq, bk, query, key, tiles, s, ds, to_q, to_k,
    batch, n_queries, n_keys, channels_q, channels_k, inner, width, scale, first_row,
    HAS_WQ: tl.constexpr, HAS_WK: tl.constexpr, HAS_BQ: tl.constexpr, HAS_BK: tl.constexpr,
    TO_Q: tl.constexpr, TO_K: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs: (tile, head). Forward stores s; with TO_Q or TO_K it instead stores ds · k and
    ds · q of each row, from `first_row` on."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    cls = tl.load(tiles + 3 * tile)
    row = tl.load(tiles + 3 * tile + 1) + tl.arange(0, BLOCK_M)
    fine = row < tl.load(tiles + 3 * tile + 2)
    pair = row // batch
    b = (row % batch).to(tl.int64)
    i = tl.load(query + pair, mask=fine, other=0).to(tl.int64)
    j = tl.load(key + pair, mask=fine, other=0).to(tl.int64)
    cell = ((b * heads + head) * n_queries + i) * n_keys + j
    d = tl.arange(0, BLOCK_D)
    q = tl.zeros((BLOCK_M, BLOCK_D), SUMS)
    k = tl.zeros((BLOCK_M, BLOCK_D), SUMS)
    if TO_K or not TO_Q:
        q = _projected(
            xq, wq, bq, b * n_queries + i, fine, cls, head, channels_q, inner, width,
            HAS_WQ, HAS_BQ, SUMS, PRECISION, UPCAST, BLOCK_M, BLOCK_D, BLOCK_K,
        )  # fmt: skip
    if TO_Q or not TO_K:
        k = _projected(
            xk, wk, bk, b * n_keys + j, fine, cls, head, channels_k, inner, width,
            HAS_WK, HAS_BK, SUMS, PRECISION, UPCAST, BLOCK_M, BLOCK_D, BLOCK_K,
        )  # fmt: skip
    if TO_Q or TO_K:
        up = tl.load(ds + cell, mask=fine, other=0.0).to(SUMS)[:, None] * scale
        at = (row - first_row).to(tl.int64)[:, None] * inner + head * width + d[None, :]
        stored = fine[:, None] & (d[None, :] < width)
        if TO_Q:
            tl.store(to_q + at, (up * k).to(to_q.dtype.element_ty), mask=stored)
        if TO_K:
            tl.store(to_k + at, (up * q).to(to_k.dtype.element_ty), mask=stored)
    else:
        tl.store(s + cell, tl.sum(q * k, 1) * scale, mask=fine)


@tuned(
    {"BLOCK_K": (32, 64)},
    ("channels", "columns", "width", "BLOCK_M", "BY_PAIR", "HAS_W", "WEIGHTED"),
    restore=("out",),
)
@triton.jit
def token_sums(
    rows, w, bias, a, out, entries, starts, stops, classes, other,
    batch, tokens, others, channels, columns, heads, width, first_row,
    a_token, a_other, a_head,
    BY_PAIR: tl.constexpr, HAS_W: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs: (token · parts of the batch, parts of the columns).

    out[b, token, :] = Σ over the token's pairs of row W[class], the row being that of the pair
    (BY_PAIR, from `first_row` on) or of the pair's other token. `channels` is the length of a row,
    `columns` that of out. WEIGHTED "columns" multiplies by the weight a of the head that the column
    belongs to (a part of the columns is a head then); "rows" by that of the channel's head.
    TRANSPOSED multiplies by the matrix's transpose. With ADD it adds to what out holds.
    """
    parts = tl.cdiv(batch, BLOCK_M)
    token = tl.program_id(0) // parts
    b = (tl.program_id(0) % parts) * BLOCK_M + tl.arange(0, BLOCK_M)
    fine = b < batch
    b = b.to(tl.int64)
    head = tl.program_id(1)
    n = tl.arange(0, BLOCK_N)
    if WEIGHTED == "columns":
        near = n < width
        n = head * width + n
    else:
        n = head * BLOCK_N + n
        near = n < columns
    cell = (b * tokens + token)[:, None] * columns + n[None, :]
    stored = fine[:, None] & near[None, :]
    y = tl.zeros((BLOCK_M, BLOCK_N), SUMS)
    if ADD:
        y = tl.load(out + cell, mask=stored, other=0.0).to(SUMS)
    for entry in range(tl.load(starts + token), tl.load(stops + token)):
        pair = tl.load(entries + entry)
        cls = tl.load(classes + pair).to(tl.int64)
        far = tl.load(other + pair).to(tl.int64)
        if BY_PAIR:
            row = (pair.to(tl.int64) * batch + b - first_row) * channels
        else:
            row = (b * others + far) * channels
        if WEIGHTED != "no":
            weight = a + b * heads * a_head + token * a_token + far * a_other
        if HAS_W:
            matrix = w + cls * channels * columns
            part = tl.zeros((BLOCK_M, BLOCK_N), SUMS)
            # parts of a row lie within one head where the head's weight multiplies it
            for start in range(0, channels, width if WEIGHTED == "rows" else channels):
                stop = start + (width if WEIGHTED == "rows" else channels)
                for at in range(start, stop, BLOCK_K):
                    k = at + tl.arange(0, BLOCK_K)
                    r = tl.load(
                        rows + row[:, None] + k[None, :],
                        mask=fine[:, None] & (k[None, :] < stop), other=0.0,
                    )  # fmt: skip
                    if WEIGHTED == "rows":
                        times = tl.load(weight + (start // width) * a_head, mask=fine, other=0.0)
                        r = (r.to(SUMS) * times.to(SUMS)[:, None]).to(r.dtype)
                    if TRANSPOSED:
                        cells = n[None, :] * channels + k[:, None]
                    else:
                        cells = k[:, None] * columns + n[None, :]
                    m = tl.load(matrix + cells, mask=(k[:, None] < stop) & near[None, :], other=0.0)
                    m = m.to(r.dtype)
                    if UPCAST:
                        r = r.to(SUMS)
                        m = m.to(SUMS)
                    part = tl.dot(r, m, part, input_precision=PRECISION, out_dtype=SUMS)
        else:
            part = tl.load(rows + row[:, None] + n[None, :], mask=stored, other=0.0).to(SUMS)
        if HAS_BIAS:
            part += tl.load(bias + cls * columns + n, mask=near, other=0.0).to(SUMS)[None, :]
        if WEIGHTED == "columns":
            part *= tl.load(weight + head * a_head, mask=fine, other=0.0).to(SUMS)[:, None]
        y += part
    tl.store(out + cell, y.to(out.dtype.element_ty), mask=stored)


@tuned(
    {"BLOCK_M": (32, 64), "BLOCK_K": (64, 128)},
    ("channels", "inner", "width", "BY_PAIR", "HAS_W", "batch"),
)
@triton.jit
def class_outer(
    x, rows, a, dw, db, bounds, token, far,
    batch, tokens, others, channels, inner, heads, width, first_class, first_row,
    n_queries, n_keys,
    BY_PAIR: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_W: tl.constexpr, SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs: (class, part of the channels, head).

    dw[class] = Σ over its rows of x[token]ᵀ g, and db[class] = Σ g, with g the row of the pair
    (BY_PAIR, from `first_row` on), or a · the row of the pair's other token.
    """
    cls = first_class + tl.program_id(0)
    part = tl.program_id(1)
    head = tl.program_id(2)
    c = part * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    column = head * width + d
    y = tl.zeros((BLOCK_K, BLOCK_D), SUMS)
    total = tl.zeros((BLOCK_D,), SUMS)
    start = tl.load(bounds + cls) * batch
    stop = tl.load(bounds + cls + 1) * batch
    for at in range(start, stop, BLOCK_M):
        row = at + tl.arange(0, BLOCK_M)
        fine = row < stop
        pair = row // batch
        b = (row % batch).to(tl.int64)
        near = tl.load(token + pair, mask=fine, other=0).to(tl.int64)
        if BY_PAIR:
            g = tl.load(
                rows + (row - first_row).to(tl.int64)[:, None] * inner + column[None, :],
                mask=fine[:, None] & (d[None, :] < width), other=0.0,
            )  # fmt: skip
        else:
            other = tl.load(far + pair, mask=fine, other=0).to(tl.int64)
            g = tl.load(
                rows + (b * others + other)[:, None] * inner + column[None, :],
                mask=fine[:, None] & (d[None, :] < width), other=0.0,
            )  # fmt: skip
            times = tl.load(
                a + ((b * heads + head) * n_queries + other) * n_keys + near, mask=fine, other=0.0
            )
            g = (g.to(SUMS) * times.to(SUMS)[:, None]).to(g.dtype)
        if HAS_W:
            r = tl.load(
                x + (b * tokens + near)[:, None] * channels + c[None, :],
                mask=fine[:, None] & (c[None, :] < channels), other=0.0,
            )  # fmt: skip
            if UPCAST:
                r = r.to(SUMS)
                g = g.to(SUMS)
            y = tl.dot(tl.trans(r), g, y, input_precision=PRECISION, out_dtype=SUMS)
        if HAS_BIAS:
            total += tl.sum(g.to(SUMS), 0)
    where = cls.to(tl.int64)
    if HAS_W:
        tl.store(
            dw + where * channels * inner + c[:, None] * inner + column[None, :],
            y.to(dw.dtype.element_ty), mask=(c[:, None] < channels) & (d[None, :] < width),
        )  # fmt: skip
    if HAS_BIAS and part == 0:
        tl.store(db + where * inner + column, total.to(db.dtype.element_ty), mask=d < width)
