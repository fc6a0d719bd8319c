"""What the kernels share: masked loads, products of tiles, and columns that belong to heads.

Vocabulary of all kernels:

    pair      a (query token, key token) that the layout contains; pairs are numbered by class
    row       one pair of one sample, row = pair · batch + sample: the batch is the fast axis
    class     what the pairs that use the same matrix have in common (on a grid: their offset)
    columns   the heads · head_dim numbers that a row is projected to

    BLOCK_M   rows of a tile
    N1, N2    columns of a tile. Triton's blocks are powers of two; 128 + 64 columns hold the 192 of
              three heads of 64 without waste, and the rows are then gathered once for all heads.
              N2 = 0 is one block only, and what would belong to the second repeats the first.
    D         columns that a head takes in a tile: head_dim rounded up to a power of two
    TIGHT     head_dim = D, so that a tile's columns are consecutive in memory
    BLOCK_K   channels that are multiplied at a time
    EVEN_…    the blocks divide the size, so that no load along it needs a mask
    SUMS      the dtype that sums are kept in: float32 (float64 for float64)
    PRECISION of float32 products: "tf32" where torch allows it, else "ieee"
    UPCAST    multiply in SUMS: for the interpreter, which cannot multiply bfloat16
    LONG      offsets into the tensors do not fit in 32 bits
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["columns_of_heads", "load", "multiply", "split_heads"]


@triton.jit
def load(pointers, rows, columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A tile of which only the cells in `rows` [., 1] and `columns` [1, .] exist; others are 0.

    A mask that is known to be full costs instructions and keeps loads narrow, so each of the two is
    only applied where its flag says so.
    """
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(pointers, mask=rows & columns, other=0.0)
    elif MASK_ROWS:
        return tl.load(pointers, mask=rows, other=0.0)
    elif MASK_COLUMNS:
        return tl.load(pointers, mask=columns, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def multiply(a, b, total, SUMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """total + a b. A table may be wider than the tokens; it is multiplied in their dtype."""
    b = b.to(a.dtype)
    if UPCAST:
        a = a.to(SUMS)
        b = b.to(SUMS)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=SUMS)


@triton.jit
def columns_of_heads(head, heads, width, N: tl.constexpr, D: tl.constexpr, TIGHT: tl.constexpr):
    """The columns in memory of a block of N that begins with `head`, and which of them exist."""
    n = tl.arange(0, N)
    if TIGHT:
        column = head * D + n
        exists = head + n // D < heads
    else:
        column = (head + n // D) * width + n % D
        exists = (head + n // D < heads) & (n % D < width)
    return column, exists


@triton.jit
def split_heads(y, BLOCK_M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """[BLOCK_M, N] -> [BLOCK_M, heads of the block, D]."""
    return tl.reshape(y, (BLOCK_M, N // D, D))
