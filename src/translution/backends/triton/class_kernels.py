"""The kernels that sum over the pairs of a class: the gradients of tables and of their biases.

With g as the gradient of a projected row x W[c] + b[c], they compute for each class c

    dW[c] = Σ over the rows of class c of xᵀ g        (`class_outer`)
    db[c] = Σ over the rows of class c of g           (`class_sums`)

A program computes one tile of one class's gradient from all rows of that class. Each number is
therefore written once, by one program that sums in one order. The plain way, dividing the rows of a
class over programs, would need atomic additions or a second pass over partial sums.

Shapes in comments: R rows of a step (BLOCK_R), C channels (BLOCK_C), N columns (N1 or N2). See
`tile_math` for the names.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile_math import load, multiply

__all__ = ["class_outer", "class_sums", "divide"]


@triton.jit
def divide(row, multiplier, shift):
    """row // batch for rows below 2³¹, computed as (row · multiplier) >> shift.

    `tables.divisor` computes the multiplier and the shift. An ordinary division takes about twenty
    instructions, and the loops here need one per row that they load. If the batch were a
    compile-time constant, the compiler would do the same, but each batch size would be compiled.
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
        "column_parts",
        "channel_parts",
    ],
    do_not_specialize_on_alignment=["order"],
)
def class_outer(
    x, rows, dw, token, x_2, rows_2, dw_2, token_2, order, bounds,
    batch, multiplier, shift, tokens, tokens_2, channels, inner, first_row,
    column_parts, channel_parts,
    BOTH: tl.constexpr, EVEN_C: tl.constexpr, EVEN_N: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, LONG: tl.constexpr,
    BLOCK_C: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write dw[class] = Σ over its rows of x[token of the row]ᵀ rows[row - first_row].

    Programs: class · part of the channels · part of the columns. There are `channel_parts` parts of
    the channels and `column_parts` of the columns. `order` lists the classes, the largest first, so
    that the programs that start last are short.

    With BOTH, one launch computes the gradients of two tables, query (x, rows, dw, token) and key
    (the same with _2), in alternating programs. Two launches would each leave part of the GPU idle
    while their last programs run.
    """
    column_part = tl.program_id(0) % column_parts
    line = tl.program_id(0) // column_parts
    cls = tl.load(order + line // channel_parts)
    c = (line % channel_parts) * BLOCK_C + tl.arange(0, BLOCK_C)
    if BOTH:
        if column_part % 2 == 1:
            x = x_2
            rows = rows_2
            dw = dw_2
            token = token_2
            tokens = tokens_2
        column_part = column_part // 2
    n1 = column_part * (N1 + N2) + tl.arange(0, N1)
    c_mask = c < channels
    mask1 = n1 < inner
    y1 = tl.zeros((BLOCK_C, N1), SUMS)
    if N2 > 0:
        n2 = column_part * (N1 + N2) + N1 + tl.arange(0, N2)
        mask2 = n2 < inner
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
        # r [R, C], the tokens, and g [R, N], the gradients of their projections
        r = load(
            x + offset[:, None] + c[None, :], valid[:, None], c_mask[None, :], True, not EVEN_C
        )
        g = load(rows + at[:, None] + n1[None, :], valid[:, None], mask1[None, :], True, not EVEN_N)
        y1 = multiply(tl.trans(r), g, y1, SUMS, PRECISION, UPCAST)
        if N2 > 0:
            g = load(
                rows + at[:, None] + n2[None, :], valid[:, None], mask2[None, :], True, not EVEN_N
            )
            y2 = multiply(tl.trans(r), g, y2, SUMS, PRECISION, UPCAST)
    pointers = dw + cls.to(tl.int64) * channels * inner + c[:, None] * inner
    tl.store(
        pointers + n1[None, :], y1.to(dw.dtype.element_ty), mask=c_mask[:, None] & mask1[None, :]
    )
    if N2 > 0:
        tl.store(
            pointers + n2[None, :],
            y2.to(dw.dtype.element_ty),
            mask=c_mask[:, None] & mask2[None, :],
        )


@triton.jit(
    do_not_specialize=["batch", "first_row", "column_parts"],
    do_not_specialize_on_alignment=["order"],
)
def class_sums(
    rows, db, order, bounds, batch, inner, first_row, column_parts,
    SUMS: tl.constexpr, LONG: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write db[class] = Σ of its rows. Programs: class · part of the columns."""
    cls = tl.load(order + tl.program_id(0) // column_parts)
    n = (tl.program_id(0) % column_parts) * BLOCK_N + tl.arange(0, BLOCK_N)
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
