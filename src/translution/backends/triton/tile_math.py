"""What all kernels share: masked loads, products of tiles, and columns that belong to heads.

The kernels use these words and names:

    pair      a (query token, key token) that the layout contains; pairs are sorted by class
    row       a pair of one sample; row = pair · batch + sample, so the sample is the fast axis
    class     the set of pairs that use the same matrix of a table (on a grid: the same offset)
    columns   the heads · head_dim numbers that a row is projected to
    cell      a (query, key) of one sample and head in a dense [batch, heads, queries, keys] tensor

    BLOCK_M   the number of rows of a tile
    N1, N2    the number of columns of a tile, which is divided into two blocks (see below)
    D         the columns that a head has in a tile: head_dim, rounded up to a power of two
    TIGHT     whether D is head_dim, so that the columns of a tile are consecutive in memory
    BLOCK_K   the number of channels that are multiplied at a time
    EVEN_…    whether blocks divide the size, so that loads along it need no mask
    SUMS      the dtype of sums: float32 (float64 for float64)
    PRECISION how float32 is multiplied: "tf32" where torch allows it, else "ieee"
    UPCAST    whether products are computed in SUMS, for the interpreter, which cannot multiply
              bfloat16
    LONG      whether offsets into the tensors need 64 bits

Two blocks of columns. The size of a Triton block is a power of two. Three heads of 64 are 192
columns: one block of 256 would waste a quarter of the multiplications, and blocks of 64 would
gather the same rows three times. So a tile consists of two blocks, here of N1 = 128 and N2 = 64
columns, and the rows are gathered once. N2 = 0 means that there is only one block; functions that
return both then return the first one twice. Because a block is a variable and a loop over variables
is not possible in Triton, the code for the second block repeats that for the first.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["columns_of_heads", "load", "multiply", "split_heads"]


@triton.jit
def load(pointers, rows, columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """Load a tile, with zeros outside of the masks `rows` [., 1] and `columns` [1, .].

    Each mask is only applied if its flag is set. A mask costs instructions and makes the compiler
    load fewer bytes at a time, even if it is true everywhere.
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
    """total + a b, computed in the dtype of a. (b may be a float32 table under autocast.)"""
    b = b.to(a.dtype)
    if UPCAST:
        a = a.to(SUMS)
        b = b.to(SUMS)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=SUMS)


@triton.jit
def columns_of_heads(head, heads, width, N: tl.constexpr, D: tl.constexpr, TIGHT: tl.constexpr):
    """Where the N columns of a block that begins with `head` are in memory, and which exist."""
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
    """Reshape [BLOCK_M, N] to [BLOCK_M, heads of the block, D]."""
    return tl.reshape(y, (BLOCK_M, N // D, D))
