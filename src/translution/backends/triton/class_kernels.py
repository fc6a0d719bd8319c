"""The kernels that sum over the pairs of a class: the gradients of tables and their biases.

A program makes a tile of one class's gradient from all rows of the class, so that it is written
once, without atomics. See `tile_math` for the vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile_math import load, multiply

__all__ = ["class_outer", "class_sums", "divide"]


@triton.jit
def divide(row, multiplier, shift):
    """row // batch for rows below 2³¹, as (row · multiplier) >> shift (see `tables.divisor`).

    A division costs some twenty instructions, and these loops make one for each row that they load.
    Were the batch a constant of the kernel, a new batch would compile a new kernel.
    """
    return ((row.to(tl.int64) * multiplier) >> shift).to(tl.int32)


@triton.jit(
    do_not_specialize=[
        "batch",
        "multiplier",
        "shift",
        "tokens",
        "tokens_2",
        "first_row",
        "across",
        "down",
    ],
    do_not_specialize_on_alignment=["order"],
)
def class_outer(
    x, rows, dw, token, x_2, rows_2, dw_2, token_2, order, bounds,
    batch, multiplier, shift, tokens, tokens_2, channels, inner, first_row, across, down,
    BOTH: tl.constexpr, EVEN_C: tl.constexpr, EVEN_N: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, LONG: tl.constexpr,
    BLOCK_C: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dw[class] = Σ over its rows of x[token of the row]ᵀ rows[row - first_row].

    Programs: class · part of the channels (`down` of them) · part of the columns (`across`; with
    BOTH those of both sides, query and key, in turn). `order` lists the classes, the largest
    first, so that the last programs to start are short.
    """
    place = tl.program_id(0) % across
    line = tl.program_id(0) // across
    cls = tl.load(order + line // down)
    c = (line % down) * BLOCK_C + tl.arange(0, BLOCK_C)
    if BOTH:
        if place % 2 == 1:
            x = x_2
            rows = rows_2
            dw = dw_2
            token = token_2
            tokens = tokens_2
        place = place // 2
    n1 = place * (N1 + N2) + tl.arange(0, N1)
    in_c = c < channels
    in1 = n1 < inner
    y1 = tl.zeros((BLOCK_C, N1), SUMS)
    if N2 > 0:
        n2 = place * (N1 + N2) + N1 + tl.arange(0, N2)
        in2 = n2 < inner
        y2 = tl.zeros((BLOCK_C, N2), SUMS)
    start = tl.load(bounds + cls) * batch
    stop = tl.load(bounds + cls + 1) * batch
    for begin in range(start, stop, BLOCK_R):
        row = begin + tl.arange(0, BLOCK_R)
        valid = row < stop
        pair = divide(row, multiplier, shift)
        b = row - pair * batch
        t = tl.load(token + pair, mask=valid, other=0)
        if LONG:
            offset = (b * tokens + t).to(tl.int64) * channels
            at = (row - first_row).to(tl.int64) * inner
        else:
            offset = (b * tokens + t) * channels
            at = (row - first_row) * inner
        r = load(x + offset[:, None] + c[None, :], valid[:, None], in_c[None, :], True, not EVEN_C)
        g = load(rows + at[:, None] + n1[None, :], valid[:, None], in1[None, :], True, not EVEN_N)
        y1 = multiply(tl.trans(r), g, y1, SUMS, PRECISION, UPCAST)
        if N2 > 0:
            g = load(
                rows + at[:, None] + n2[None, :], valid[:, None], in2[None, :], True, not EVEN_N
            )
            y2 = multiply(tl.trans(r), g, y2, SUMS, PRECISION, UPCAST)
    where = dw + cls.to(tl.int64) * channels * inner + c[:, None] * inner
    tl.store(where + n1[None, :], y1.to(dw.dtype.element_ty), mask=in_c[:, None] & in1[None, :])
    if N2 > 0:
        tl.store(where + n2[None, :], y2.to(dw.dtype.element_ty), mask=in_c[:, None] & in2[None, :])


@triton.jit(
    do_not_specialize=["batch", "first_row", "across"], do_not_specialize_on_alignment=["order"]
)
def class_sums(
    rows, db, order, bounds, batch, inner, first_row, across,
    SUMS: tl.constexpr, LONG: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """db[class] = Σ of its rows. Programs: class · part of the columns (`across` of them)."""
    cls = tl.load(order + tl.program_id(0) // across)
    n = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.zeros((BLOCK_R, BLOCK_N), SUMS)
    stop = tl.load(bounds + cls + 1) * batch
    for begin in range(tl.load(bounds + cls) * batch, stop, BLOCK_R):
        row = begin + tl.arange(0, BLOCK_R)
        at = row - first_row
        if LONG:
            at = at.to(tl.int64)
        y += tl.load(
            rows + (at * inner)[:, None] + n[None, :],
            mask=(row < stop)[:, None] & (n < inner)[None, :], other=0.0,
        ).to(SUMS)  # fmt: skip
    tl.store(
        db + cls.to(tl.int64) * inner + n, tl.sum(y, 0).to(db.dtype.element_ty), mask=n < inner
    )
