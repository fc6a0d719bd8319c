"""Measure block sizes of the Triton kernels, for the table in `backends.triton.blocks`.

The operators never run this module: they look their block sizes up in the table.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...backends.triton.blocks import KINDS, Blocks, choose, overridden
from ...layouts import Layout
from ...utils.measuring import seconds

__all__ = ["KINDS", "Work", "candidates", "tried"]


@dataclass(frozen=True)
class Work:
    """The shapes for which the kernels are timed.

    Attributes:
        grid: the number of tokens along each axis.
        causal: whether a token only sees the tokens before it and itself.
        channels: the number of channels of a token.
        heads: the number of heads.
        batch: the number of samples.
        dtype: the dtype of tokens and weights.
        device: the device that computes.
    """

    grid: tuple[int, ...]
    causal: bool
    channels: int
    heads: int
    batch: int
    dtype: torch.dtype
    device: torch.device

    @property
    def layout(self) -> Layout:
        """The offset class of each pair of tokens."""
        return Layout(self.grid, causal=self.causal)

    def usual(self, kind: str) -> Blocks:
        """Return the block sizes that the table has for a kind of kernel."""
        width = 0 if kind in ("token_grads", "table_grads") else self.channels // self.heads
        return choose(kind, self.dtype, self.channels, self.channels, width)

    def call(self, kind: str) -> tuple[Callable[[], Any], int]:
        """Prepare a launch of a kernel.

        Args:
            kind: a name of `KINDS`.

        Returns:
            A function that launches the kernel, and its number of multiply-adds.
        """
        from ...backends.triton.launch import Problem, Side
        from ...operands import Operand

        layout, c = self.layout, self.channels
        make: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        x = torch.randn(self.batch, layout.tokens, c, **make)
        w = torch.randn(layout.classes, c, c, **make) * c**-0.5
        cells = self.batch, self.heads, layout.tokens, layout.tokens
        s = torch.randn(cells, device=self.device)
        problem = Problem(layout, x, self.heads, c)
        chunks = problem.chunks(2 * c * x.element_size())
        at = len(chunks.classes) // 2
        rows = [problem.rows(chunks, x).normal_() for _ in "qk"]
        token = torch.zeros(x.shape, device=self.device)
        sides = [Side(by_query, x, w, None, None, None) for by_query in (True, False)]
        begin, end = chunks.pairs[at]
        unit = self.batch * c * c
        part, whole = (end - begin) * unit, problem.count * unit

        def products(kind: str, wq: Any, **more: Any) -> Callable[[], None]:
            query, key = Operand(x, wq), Operand(x, w)
            return lambda: problem.pair_products(kind, query, key, 0.1, **more)

        def gradients(**room: Any) -> Callable[[], None]:
            pairs = [(side._replace(**room), r) for side, r in zip(sides, rows, strict=True)]
            return lambda: problem.gradients(chunks, at, *pairs)

        chunk = {"chunks": chunks, "at": at}
        if kind == "scores":
            return products(kind, w, s=s), 2 * whole
        if kind == "mix":
            return (lambda: problem.mix(s, Operand(x, w))), whole
        if kind == "score_grads":
            return products(kind, w, ds=s, to_q=rows[0], to_k=rows[1], **chunk), 2 * part
        if kind == "mix_grads":
            return products(kind, None, s=s, ds=s, to_k=rows[0], **chunk), part
        if kind == "token_grads":
            return gradients(dx=token), 2 * part
        return gradients(dw=torch.empty_like(w)), 2 * part


def candidates(kind: str, usual: Blocks) -> list[Blocks]:
    """Return the block sizes to try: the usual ones first, then those that differ from them least.

    Args:
        kind: the kind of kernel, a name of `KINDS`.
        usual: the block sizes of the table.
    """
    columns = [(64, 0), (128, 0), (128, 64), (256, 0)]
    loops = (False, True) if kind in ("scores", "score_grads") else (False,)
    every = [
        Blocks(rows, *columns_, 64, warps, stages, loop)
        for rows, columns_, warps, stages, loop in itertools.product(
            (64, 128), columns, (4, 8), (3, 4, 5), loops
        )
        if rows * sum(columns_) <= 128 * 256
    ]
    differences = {b: sum(x != y for x, y in zip(b, usual, strict=True)) for b in every}
    others = sorted((b for b in every if b != usual), key=differences.__getitem__)
    return [usual, *others]


def tried(work: Work, kind: str, repeats: int) -> Iterator[tuple[Blocks, float | None, int]]:
    """Time a kernel with each of its candidate block sizes.

    Args:
        work: the shapes.
        kind: the kind of kernel, a name of `KINDS`.
        repeats: the number of timed launches; their median is reported.

    Yields:
        The block sizes, the seconds (None if they do not compile or fit), and the multiply-adds.
    """
    call, count = work.call(kind)
    for blocks in candidates(kind, work.usual(kind)):
        with overridden(kind, blocks):
            try:
                yield blocks, seconds(call, work.device, repeats), count
            except Exception:
                # Triton has a different exception for each way in which block sizes do not fit
                yield blocks, None, count
