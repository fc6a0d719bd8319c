"""Launching the kernels: which block sizes, flags and index tables each of them gets.

A `Problem` is one call of an operator. Its methods are the kinds of work that the call consists of:
products of pairs, sums over the pairs of a token, and sums over the pairs of a class. On the meta
device they compile their kernels and launch nothing (`support.launch`). `ahead` uses this to
compile the kernels of the backward pass during the forward pass.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layouts import Layout
from ...operands import Operand
from ..torch.offset import sum_dtype
from . import tables
from .blocks import Blocks, choose, power
from .class_kernels import class_outer, class_sums
from .pair_kernels import pair_products
from .support import arithmetic, interpreted, launch
from .token_kernels import pair_sums, token_sums

__all__ = ["MEMORY", "Problem", "Side", "long", "split_evenly"]

MEMORY = 256 << 20
"""The bytes of projected rows that exist at a time in the backward pass; or the bytes of the
scores, if these are more. (On an H100, 1 GiB was no faster.)"""
ROWS = 1 << 31
"""The number of rows (pairs · batch) has to be below this, since kernels count them in 32 bits."""


class Side(NamedTuple):
    """One side of the pairs in the backward pass.

    Attributes:
        by_query: whether this is the side of the queries. If not, it is that of the keys or values.
        x, w: the tokens, and the table or None, as in `Operand`.
        dx, dw, db: where the gradients are written; None for one that is not wanted.
    """

    by_query: bool
    x: Tensor
    w: Tensor | None
    dx: Tensor | None
    dw: Tensor | None
    db: Tensor | None

    @property
    def wanted(self) -> bool:
        """Whether any gradient of this side is wanted."""
        return not (self.dx is None and self.dw is None and self.db is None)


class Problem:
    """One call of an operator: its sizes, its index tables, and its launches.

    Args:
        layout: the layout of the pairs.
        x: tokens [batch, tokens, channels]. The device, the dtype and the batch are theirs.
        heads: the number of heads.
        inner: heads · head_dim.

    Raises:
        ValueError: there are too many pairs and samples to count them in 32 bits.
    """

    def __init__(self, layout: Layout, x: Tensor, heads: int, inner: int):
        self.layout, self.device, self.dtype = layout, x.device, x.dtype
        self.batch, self.heads, self.inner, self.width = x.shape[0], heads, inner, inner // heads
        self.queries, self.keys = layout.n_queries, layout.n_keys
        self.dry = x.device.type == "meta"
        self.count = layout.pairs_on("cpu").starts[-1]
        if self.count * self.batch >= ROWS:
            raise ValueError(
                f"backend 'triton': got {self.count} pairs in a batch of {self.batch}, want fewer "
                f"than 2**31 in all; use smaller batches, or backend='torch'"
            )
        self.sum_dtype = sum_dtype(x.dtype)
        self.common = arithmetic(x.dtype)

    @property
    def empty(self) -> bool:
        """Whether there is no row."""
        return not self.batch or not self.count

    def chunks(self, row_bytes: int) -> tables.Chunks:
        """Divide the classes for the backward pass, where a row takes `row_bytes` bytes."""
        if self.dry:
            whole = ((0, self.layout.classes),), ((0, self.count),)
            return tables.Chunks(*whole, most=1, limit=1)
        scores = self.batch * self.heads * self.queries * self.keys * 4
        limit = max(1, max(MEMORY, scores) // max(1, row_bytes * self.batch))
        return tables.chunks(self.layout, torch.device("cpu"), limit)

    def rows(self, chunks: tables.Chunks, like: Tensor) -> Tensor:
        """Allocate the rows of the largest chunk, [rows, heads · head_dim]."""
        return like.new_empty(chunks.most * self.batch, self.inner)

    # -- Index tables. On the meta device, where kernels are only compiled, they are empty. --------

    def _sides(self) -> tables.Sides:
        if self.dry:
            return tables.Sides(*(self._no_table() for _ in range(3)))
        return tables.sides(self.layout, self.device)

    def _tiles(self, rows: int, classes: tuple[int, int] | None) -> Tensor:
        if self.dry:
            return self._no_table()
        table, first = tables.tiles(self.layout, self.device, self.batch, rows)
        return table if classes is None else table[first[classes[0]] : first[classes[1]]]

    def _groups(self, by_query: bool, by_pair: bool, most: int, limit: int) -> tables.Groups:
        if self.dry:
            return tables.Groups(*(self._no_table() for _ in range(4)))
        return tables.groups(self.layout, self.device, by_query, by_pair, most, limit)

    def _order(self, chunks: tables.Chunks, at: int) -> Tensor:
        if self.dry:
            return self._no_table()
        first, stop = chunks.classes[at]
        return tables.largest_first(self.layout, self.device, chunks.limit)[first:stop]

    def _no_table(self) -> Tensor:
        return torch.empty(1, 1, 1, dtype=torch.int32, device=self.device)

    # -- Launches ---------------------------------------------------------------------------------

    def pair_products(
        self, kind: str, query: Operand, key: Operand, scale: float, *, s: Tensor | None = None,
        ds: Tensor | None = None, to_q: Tensor | None = None, to_k: Tensor | None = None,
        chunks: tables.Chunks | None = None, at: int = 0,
    ) -> None:  # fmt: skip
        """Launch `pair_kernels.pair_products` on the pairs of a chunk (or on all pairs).

        Args:
            kind: which block sizes are used, one of `blocks.KINDS`.
            query, key, scale: as in `scores`.
            s: where the scores are written, or None.
            ds: the gradients of the scores, which to_q and to_k need.
            to_q, to_k: where the gradients of the projected rows are written, or None.
            chunks, at: the chunks of the backward pass, and the index of the one to compute.
        """
        (xq, wq, bq), (xk, wk, bk) = query, key
        channels = [x.shape[-1] for x, w in ((xq, wq), (xk, wk)) if w is not None]
        block = choose(kind, self.dtype, max(channels, default=16), self.inner, self.width)
        one_loop = (
            block.one_loop and len(channels) == 2 and channels[0] == channels[1]
            and channels[0] % block.k == 0 and bq is None and bk is None
        )  # fmt: skip
        table = self._tiles(block.rows, None if chunks is None else chunks.classes[at])
        first_row = 0 if chunks is None else chunks.pairs[at][0] * self.batch
        sides, head = self._sides(), power(self.width)
        together = (block.n1 + block.n2) // head
        parts = -(-self.heads // together)
        launch(
            pair_products, (len(table) * parts,),
            xq, xk, wq, wk, bq, bk, sides.query, sides.key, table, s, ds, to_q, to_k,
            self.batch, self.queries, self.keys, xq.shape[-1], xk.shape[-1], self.inner,
            self.heads, self.width, scale, first_row, parts,
            HAS_WQ=wq is not None, HAS_WK=wk is not None,
            HAS_BQ=bq is not None, HAS_BK=bk is not None,
            SCORE=s is not None, TO_Q=to_q is not None, TO_K=to_k is not None, ONE_LOOP=one_loop,
            EVEN_Q=xq.shape[-1] % block.k == 0, EVEN_K=xk.shape[-1] % block.k == 0,
            EVEN_N=head == self.width and self.heads % together == 0,
            TIGHT=head == self.width, D=head, LONG=long(xq, xk, to_q, to_k),
            BLOCK_M=block.rows, N1=block.n1, N2=block.n2, BLOCK_K=block.k,
            **_options(block), **self.common,
        )  # fmt: skip

    def mix(self, a: Tensor, value: Operand) -> Tensor:
        """Compute Σ over the pairs of a query of a · (x W[class] + b).

        Returns:
            [batch, queries, heads · head_dim].
        """
        x, w, b = value
        assert w is not None
        channels, columns = x.shape[-1], w.shape[-1]
        block = choose("mix", self.dtype, channels, columns, self.width)
        head = power(self.width)
        across = block.n1 + block.n2
        columns_in_blocks = self.heads * head
        most, part_batch, parts = self._rows_of_tile(block.rows)
        groups = self._groups(True, False, most, 0)
        count = len(groups.members)
        column_parts = -(-columns_in_blocks // across)
        programs = count * parts * column_parts
        split = split_evenly(programs, self._slots(block.warps), self.count // max(1, count) // 8)
        # With one part the sums could be written in the dtype of x. But the number of parts depends
        # on the batch, and a kernel is compiled per dtype.
        sums = x.new_empty((split, self.batch, self.queries, columns), dtype=self.sum_dtype)
        launch(
            token_sums, (programs, split),
            x, w, b, a, sums, groups.members, groups.classes, groups.links, groups.spans[0],
            *[None] * 7, self.batch, part_batch, parts, self.queries, self.keys, channels, columns,
            self.heads, self.width, 0, self.keys, groups.size, column_parts,
            BOTH=False, BY_PAIR=False, HAS_BIAS=b is not None, WEIGHTED=True,
            EVEN_K=channels % block.k == 0,
            EVEN_N=head == self.width and columns_in_blocks % across == 0,
            TIGHT=head == self.width, STEPS=-(-channels // block.k), D=head, LONG=long(x),
            BLOCK_M=block.rows, N1=block.n1, N2=block.n2, BLOCK_K=block.k,
            **_options(block), **self.common,
        )  # fmt: skip
        return (sums.sum(0) if split > 1 else sums[0]).to(x.dtype)

    def gradients(self, chunks: tables.Chunks, at: int, *sides: tuple[Side, Tensor | None]) -> None:
        """Add the rows of a chunk to the gradients of each (side, rows): tokens, table and bias."""
        wanted = [(side, rows) for side, rows in sides if rows is not None]
        same_tables = len(wanted) == 2 and len({side.x.shape[-1] for side, _ in wanted}) == 1
        same_tables = same_tables and all(side.w is not None for side, _ in wanted)
        for name, sum_ in (("dw", self._table_grads), ("dx", self._token_grads)):
            some = [(side, rows) for side, rows in wanted if getattr(side, name) is not None]
            if len(some) == 2 and same_tables:  # one launch for both fills the GPU better
                sum_(chunks, at, some[0], some[1])
            else:
                for one in some:
                    sum_(chunks, at, one)
        for side, rows in wanted:
            if side.db is not None:
                self._bias_grads(chunks, at, side, rows)

    def _token_grads(
        self, chunks: tables.Chunks, at: int, one: tuple[Side, Tensor],
        two: tuple[Side, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Add the rows of a chunk to the gradients of the tokens of one side, or of two."""
        side, rows = one
        assert side.dx is not None
        columns = side.dx.shape[-1]
        block = choose("token_grads", self.dtype, self.inner, columns, 0)
        most, part_batch, parts = self._rows_of_tile(block.rows)
        groups = self._groups(side.by_query, True, most, chunks.limit)
        other_side: list[Any] = [None] * 7
        if two is not None:
            other, far_rows = two
            far = self._groups(other.by_query, True, most, chunks.limit)
            if far.members.shape != groups.members.shape:  # queries and keys are not equally many
                self._token_grads(chunks, at, one)
                self._token_grads(chunks, at, two)
                return
            other_side = [
                far_rows,
                other.w,
                other.dx,
                far.members,
                far.classes,
                far.links,
                far.spans[at],
            ]
        tokens, others = (self.queries, self.keys)[:: 1 if side.by_query else -1]
        first_row = chunks.pairs[at][0] * self.batch
        count, span = len(groups.members) * parts, groups.spans[at]
        if side.w is None:
            n = min(128, power(columns, 16))
            column_parts = -(-columns // n)
            launch(
                pair_sums, (count * column_parts,),
                rows, side.dx, groups.members, groups.links, span, self.batch, part_batch, parts,
                tokens, columns, first_row, groups.size, column_parts,
                SUMS=self.common["SUMS"], LONG=long(rows), BLOCK_M=block.rows, BLOCK_N=n,
            )  # fmt: skip
            return
        across = block.n1 + block.n2
        column_parts = -(-columns // across)
        launch(
            token_sums, (count * column_parts, 1 if two is None else 2),
            rows, side.w, None, None, side.dx, groups.members, groups.classes, groups.links, span,
            *other_side, self.batch, part_batch, parts, tokens, others, self.inner, columns,
            self.heads, self.width, first_row, self.keys, groups.size, column_parts,
            BOTH=two is not None, BY_PAIR=True, HAS_BIAS=False, WEIGHTED=False,
            EVEN_K=self.inner % block.k == 0, EVEN_N=columns % across == 0, TIGHT=True,
            STEPS=-(-self.inner // block.k), D=1, LONG=long(rows),
            BLOCK_M=block.rows, N1=block.n1, N2=block.n2, BLOCK_K=block.k,
            **_options(block), **self.common,
        )  # fmt: skip

    def _table_grads(
        self, chunks: tables.Chunks, at: int, one: tuple[Side, Tensor],
        two: tuple[Side, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Write the gradients of the tables of one side, or of two, for the classes of a chunk."""
        side, rows = one
        channels = side.x.shape[-1]
        block = choose("table_grads", self.dtype, channels, self.inner, 0)
        block_c = min(block.rows, power(channels, 16))
        across = block.n1 + block.n2
        sides = self._sides()
        tokens = (self.queries, self.keys)[:: 1 if side.by_query else -1]
        other_side: list[Any] = [None] * 4
        if two is not None:
            other_side = [two[0].x, two[1], two[0].dw, sides.key]
        column_parts = -(-self.inner // across) * (1 if two is None else 2)
        channel_parts, order = -(-channels // block_c), self._order(chunks, at)
        launch(
            class_outer, (len(order) * channel_parts * column_parts,),
            side.x, rows, side.dw, sides.query if side.by_query else sides.key, *other_side, order,
            sides.bounds, self.batch, *tables.divisor(self.batch), *tokens, channels, self.inner,
            chunks.pairs[at][0] * self.batch, column_parts, channel_parts,
            BOTH=two is not None, EVEN_C=channels % block_c == 0,
            EVEN_N=self.inner % across == 0, LONG=long(side.x, rows),
            BLOCK_C=block_c, N1=block.n1, N2=block.n2, BLOCK_R=block.k,
            **_options(block), **self.common,
        )  # fmt: skip

    def _bias_grads(self, chunks: tables.Chunks, at: int, side: Side, rows: Tensor) -> None:
        """Write the gradient of a table's bias for the classes of a chunk."""
        n = min(128, power(self.inner, 16))
        column_parts, order = -(-self.inner // n), self._order(chunks, at)
        launch(
            class_sums, (len(order) * column_parts,),
            rows, side.db, order, self._sides().bounds, self.batch, self.inner,
            chunks.pairs[at][0] * self.batch, column_parts,
            SUMS=self.common["SUMS"], LONG=long(rows), BLOCK_R=16 if interpreted() else 64,
            BLOCK_N=n,
        )  # fmt: skip

    def _rows_of_tile(self, block: int) -> tuple[int, int, int]:
        """Most tokens of a group, samples of a tile, and parts that the batch is divided into."""
        part = max(1, min(block, self.batch))
        return max(1, block // max(1, self.batch)), part, -(-self.batch // part)

    def _slots(self, warps: int) -> int:
        """How many programs of `warps` warps the device runs at a time."""
        if self.device.type != "cuda":
            return 1
        return _processors(self.device) * (2 if warps < 8 else 1)


def _options(block: Blocks) -> dict[str, int]:
    return {"num_warps": block.warps, "num_stages": block.stages}


def long(*tensors: Tensor | None) -> bool:
    """Whether offsets into one of the tensors need 64 bits."""
    return any(t is not None and t.numel() >= 1 << 31 for t in tensors)


def split_evenly(programs: int, slots: int, most: int) -> int:
    """The number of parts that sums are divided into, so that programs fill the device evenly.

    The device runs `slots` programs at a time. With 1.1 programs per slot, for example, most of it
    would be idle in the second round, for nearly half of the time. If each sum is computed in
    several parts by several programs, the rounds are shorter. Each part costs a little, since the
    parts are added up at the end. No atomics are needed: each part is written to memory of its own.

    Args:
        programs: the number of programs without division.
        slots: how many programs the device runs at a time.
        most: the largest number of parts (never more than 8).
    """

    def filled(split: int) -> float:
        """The share of the slots that are busy, less the cost of the parts."""
        rounds = programs * split / slots
        return rounds / -(-programs * split // slots) - 0.02 * split

    return max(range(1, max(1, min(8, most)) + 1), key=filled)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
