"""Block sizes of the kernels: a small table of measured configurations, and how others follow.

Nothing is timed when an operator runs. The table holds, for half precision on an H100, the best of
the configurations that were tried for tokens of 192, 384 and 768 channels with heads of 64;
`translution bench-tune` tries them again on another device. Block sizes depend on dtypes, channels
and head_dim alone: not on the batch and not on the number of tokens, so that a smaller last batch
or a longer text compiles nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from .support import interpreted

__all__ = [
    "KINDS",
    "SMALL",
    "Blocks",
    "choose",
    "fits_small",
    "overridden",
    "power",
    "small_as_wide",
]

KINDS = ("scores", "mix", "score_grads", "mix_grads", "token_grads", "table_grads")
"""What kernels are launched for: `pair_products` makes scores (going forward), and the rows that go
back from the scores and from the mix; `token_sums` makes the mix, and the gradients of tokens;
`class_outer` makes those of tables."""


class Blocks(NamedTuple):
    """A configuration. See `tile_math` for the names of the blocks."""

    rows: int  # BLOCK_M (of class_outer: channels)
    n1: int
    n2: int
    k: int  # BLOCK_K (of class_outer: rows)
    warps: int
    stages: int  # how many steps of a loop are being loaded or multiplied at a time
    one_loop: bool = False  # of pair_products: q and k in one loop, where that is possible


MEASURED: dict[int, dict[str, Blocks]] = {
    192: {
        "scores": Blocks(128, 128, 64, 64, 8, 3, True),
        "mix": Blocks(64, 128, 64, 64, 4, 5),
        "score_grads": Blocks(128, 64, 0, 64, 4, 3, True),
        "mix_grads": Blocks(64, 128, 64, 64, 4, 3),
        "token_grads": Blocks(64, 128, 64, 64, 4, 5),
        "table_grads": Blocks(64, 128, 64, 64, 4, 5),
    },
    384: {
        "scores": Blocks(128, 128, 64, 64, 8, 3),
        "mix": Blocks(64, 128, 0, 64, 4, 5),
        "score_grads": Blocks(128, 128, 0, 64, 4, 3),
        "mix_grads": Blocks(64, 128, 0, 64, 4, 3),
        "token_grads": Blocks(64, 128, 64, 64, 4, 5),
        "table_grads": Blocks(128, 128, 0, 64, 8, 5),
    },
    768: {
        "scores": Blocks(128, 256, 0, 64, 8, 3, True),
        "mix": Blocks(64, 128, 0, 64, 4, 5),
        "score_grads": Blocks(128, 256, 0, 64, 8, 3, True),
        "mix_grads": Blocks(128, 128, 0, 64, 4, 3),
        "token_grads": Blocks(64, 128, 0, 64, 4, 5),
        "table_grads": Blocks(128, 256, 0, 64, 8, 5),
    },
}
"""The best measured configurations in bfloat16, by channels (H100 80GB, torch 2.11, triton 3.6)."""
FULL = Blocks(64, 64, 0, 32, 4, 2)
"""float32, in every kernel: its products are slow enough that nothing else matters much."""
INTERPRETER = Blocks(32, 32, 16, 32, 4, 1, True)
"""Small, so that little inputs already have several tiles."""
SMALL = 64
"""Tables of at most so many channels (and columns, heads rounded up) are small: a matrix is one
tile, and the kernels of `small_kernels` hold it whole."""

_override: dict[str, Blocks] = {}


@contextmanager
def overridden(kind: str, blocks: Blocks) -> Iterator[None]:
    """Use these blocks for a kind of launch instead of the table's, while trying them."""
    before = _override.get(kind)
    _override[kind] = blocks
    try:
        yield
    finally:
        del _override[kind]
        if before is not None:
            _override[kind] = before


@contextmanager
def small_as_wide() -> Iterator[None]:
    """Treat small tables as wide ones, to test and to time that path with them."""
    global SMALL
    before, SMALL = SMALL, 0
    try:
        yield
    finally:
        SMALL = before


def power(n: int, least: int = 1) -> int:
    """The least power of two that is no less than n and `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


def fits_small(channels: int, heads: int, width: int) -> bool:
    """Whether tables of so many channels, for heads of so many columns, are small."""
    return power(channels, 16) <= SMALL and power(heads * power(width), 16) <= SMALL


def choose(kind: str, dtype: torch.dtype, channels: int, columns: int, width: int) -> Blocks:
    """The blocks of a launch.

    Args:
        kind: one of `KINDS`.
        dtype: that of the tokens.
        channels: the length that is summed over (of table_grads: the rows of the gradient).
        columns: how many numbers come out per row.
        width: head_dim, where a head's columns must lie in one block; else 0.
    """
    head = power(width) if width else 1
    whole = -(-columns // max(width, 1)) * head if width else columns
    if kind in _override:
        got = _override[kind]
    elif interpreted():
        got = INTERPRETER
    elif dtype not in (torch.bfloat16, torch.float16):
        # the mix holds two sums for every column
        got = FULL._replace(warps=8) if kind == "mix" else FULL
    else:
        size = max(channels, columns)
        got = MEASURED[192 if size < 288 else 384 if size < 576 else 768][kind]
        got = _narrowed(got, whole)
        if kind != "table_grads":
            got = got._replace(k=min(got.k, power(channels, 16)))
    if head > got.n1:  # a head is one block
        rows = max(16, min(got.rows, 8192 // head))
        got = got._replace(n1=head, n2=0, rows=rows)
        if head > 256:
            got = got._replace(k=16, stages=2, warps=8)
    if got.n2 and (head > got.n2 or whole <= got.n1):
        got = got._replace(n2=0)
    return got


def _narrowed(got: Blocks, columns: int) -> Blocks:
    """Blocks that waste no more columns than they must."""
    if columns <= 64:
        return got._replace(n1=power(columns, 32), n2=0)

    def waste(across: int) -> int:
        return -(-columns // across) * across - columns

    while got.n1 > 128 and waste(got.n1) > waste(got.n1 // 2):
        got = got._replace(n1=got.n1 // 2)
    if got.n2 and waste(got.n1 + got.n2) > waste(got.n1):
        got = got._replace(n2=0)
    return got
