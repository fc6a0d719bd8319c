"""Block sizes of the kernels: a table of measured configurations, and rules for other sizes.

Nothing is measured when an operator runs. The table contains, for half precision on an H100, the
fastest of the configurations that were tried for tokens of 192, 384 and 768 channels with heads of
64. `translution bench-tune` tries them on another device. Block sizes depend on dtypes, channels
and head_dim only. They do not depend on the batch or on the number of tokens, so that a smaller
last batch or a longer text compiles nothing.
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
"""What kernels are launched for. `pair_products` computes the scores, and the gradients of
projected rows from the scores and from the mix; `token_sums` computes the mix and the gradients
of tokens; `class_outer` computes the gradients of tables."""


class Blocks(NamedTuple):
    """The configuration of a kernel. See `tile_math` for the names of the blocks.

    Attributes:
        rows: BLOCK_M (for class_outer: BLOCK_C, channels).
        n1, n2: N1 and N2.
        k: BLOCK_K (for class_outer: BLOCK_R, rows).
        warps: Triton's `num_warps`.
        stages: Triton's `num_stages`, the number of steps of a loop that are in progress at a time.
        one_loop: ONE_LOOP of pair_products, where it is possible.
    """

    rows: int
    n1: int
    n2: int
    k: int
    warps: int
    stages: int
    one_loop: bool = False


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
"""For float32, in every kernel. Its products are slow, and other sizes make little difference."""
INTERPRETER = Blocks(32, 32, 16, 32, 4, 1, True)
"""For the interpreter. The blocks are small, so that small inputs have several tiles."""
SMALL = 64
"""A table is small if neither its channels nor its columns (both padded to powers of two) are more
than this. Its matrices are then one tile each, and `small_kernels` are used."""

_override: dict[str, Blocks] = {}


@contextmanager
def overridden(kind: str, blocks: Blocks) -> Iterator[None]:
    """Use a configuration for a kind of launch inside this context, to try it."""
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
    """Use the path for wide tables also for small ones inside this context, to test or time it."""
    global SMALL
    before, SMALL = SMALL, 0
    try:
        yield
    finally:
        SMALL = before


def power(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and at least `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


def fits_small(channels: int, heads: int, width: int) -> bool:
    """Whether a table of `channels` × (heads · width) is small, where width is head_dim."""
    return power(channels, 16) <= SMALL and power(heads * power(width), 16) <= SMALL


def choose(kind: str, dtype: torch.dtype, channels: int, columns: int, width: int) -> Blocks:
    """Choose the configuration of a launch.

    Args:
        kind: one of `KINDS`.
        dtype: the dtype of the tokens.
        channels: the length of the sum of a product (for table_grads: the rows of the gradient).
        columns: the columns of the result.
        width: head_dim if the columns of a head must be in one block; else 0.
    """
    head = power(width) if width else 1
    whole = -(-columns // max(width, 1)) * head if width else columns
    if kind in _override:
        block = _override[kind]
    elif interpreted():
        block = INTERPRETER
    elif dtype not in (torch.bfloat16, torch.float16):
        # the mix has two sums per column in registers
        block = FULL._replace(warps=8) if kind == "mix" else FULL
    else:
        size = max(channels, columns)
        block = MEASURED[192 if size < 288 else 384 if size < 576 else 768][kind]
        block = _narrowed(block, whole)
        if kind != "table_grads":
            block = block._replace(k=min(block.k, power(channels, 16)))
    if head > block.n1:  # a head needs a block of its own
        rows = max(16, min(block.rows, 8192 // head))
        block = block._replace(n1=head, n2=0, rows=rows)
        if head > 256:
            block = block._replace(k=16, stages=2, warps=8)
    if block.n2 and (head > block.n2 or whole <= block.n1):
        block = block._replace(n2=0)
    return block


def _narrowed(block: Blocks, columns: int) -> Blocks:
    """The same configuration with smaller column blocks, if these waste fewer columns."""
    if columns <= 64:
        return block._replace(n1=power(columns, 32), n2=0)

    def waste(across: int) -> int:
        return -(-columns // across) * across - columns

    while block.n1 > 128 and waste(block.n1) > waste(block.n1 // 2):
        block = block._replace(n1=block.n1 // 2)
    if block.n2 and waste(block.n1 + block.n2) > waste(block.n1):
        block = block._replace(n2=0)
    return block
