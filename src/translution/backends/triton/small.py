"""The primitives for small tables: launches of `small_kernels`.

`offset` chooses between this path and that for wide tables, by their size (`blocks.fits_small`).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layouts import Layout
from ...operands import Operand
from . import tables
from .blocks import power
from .launch import Problem, long, split_evenly
from .small_kernels import class_tables, pair_walk
from .support import interpreted, launch

__all__ = ["SmallProblem"]

ROWS = 64
"""Rows of a tile. With 32 to 64 channels, a multiprocessor then has space for many programs."""


class SmallProblem(Problem):
    """One call with small tables.

    Attributes:
        head: the columns of a head in a tile, head_dim rounded up to a power of two.
        columns: the columns of a tile, which are those of all heads.
    """

    def __init__(self, layout: Layout, x: Tensor, heads: int, inner: int):
        super().__init__(layout, x, heads, inner)
        self.head = power(self.width)
        self.columns = power(heads * self.head, 16)

    def scores(self, query: Operand, key: Operand, scale: float, s: Tensor) -> None:
        """Write the scores of all pairs to s, [batch, heads, queries, keys]."""
        self._walk(True, query.x, query.weight, query.bias, key, scale, s, None)

    def sums(
        self, by_query: bool, w_near: Tensor | None, far: Operand, scale: float, numbers: Tensor
    ) -> Tensor:
        """Sum scale · number · (projected row of the other token) over the pairs of each token.

        This is the mix. If there is `w_near`, the table of the token's own side, the sum is
        multiplied by its transpose, class by class: this is a gradient of tokens.

        Args:
            by_query: whether the tokens are the queries. If not, they are the keys.
            w_near: the table of the tokens' own side, or None.
            far: the operand of the other side.
            scale: a factor.
            numbers: [batch, heads, queries, keys], one number per pair and head.

        Returns:
            [batch, tokens, channels].
        """
        tokens = self.queries if by_query else self.keys
        channels = self.columns if w_near is None else power(w_near.shape[-2], 16)
        split = self._parts(by_query)
        sums = far.x.new_empty((split, self.batch, tokens, channels), dtype=self.sum_dtype)
        self._walk(by_query, None, w_near, None, far, scale, numbers, sums)
        total = sums.sum(0) if split > 1 else sums[0]
        whole = self._unpad(total) if w_near is None else total[..., : w_near.shape[-2]]
        return whole.to(far.x.dtype).contiguous()

    def tables(
        self, query: Operand, key: Operand, scale: float, ds: Tensor,
        wanted: dict[str, Tensor | None],
    ) -> None:  # fmt: skip
        """Write the gradients of both tables.

        Args:
            query, key, scale: as in `scores`.
            ds: the gradients of the scores.
            wanted: where "dwq", "dwk", "dbq" and "dbk" are written; None for one that is not
                wanted.
        """
        if all(t is None for t in wanted.values()):
            return
        classes, parts, sides = self.layout.classes, self._table_parts(), self._sides()
        xq, wq, bq = self._padded(*query)
        xk, wk, bk = self._padded(*key)
        kq, kk, n = xq.shape[-1], xk.shape[-1], self.columns
        shapes = {"dwq": (kq, n), "dwk": (kk, n), "dbq": (n,), "dbk": (n,)}
        partial = {
            name: None
            if wanted[name] is None
            else ds.new_empty((parts, classes, *shape), dtype=self.sum_dtype)
            for name, shape in shapes.items()
        }
        launch(
            class_tables, (classes, parts),
            xq, xk, wq, wk, bq, bk, ds, *partial.values(), sides.query, sides.key, sides.bounds,
            self.batch, *tables.divisor(self.batch), self.queries, self.keys, self.heads, classes,
            scale,
            HAS_WQ=wq is not None, HAS_WK=wk is not None,
            HAS_BQ=bq is not None, HAS_BK=bk is not None,
            DWQ=partial["dwq"] is not None, DWK=partial["dwk"] is not None,
            DBQ=partial["dbq"] is not None, DBK=partial["dbk"] is not None,
            LONG=long(xq, xk), BLOCK_R=self._table_rows(kq, kk, n), KQ=kq, KK=kk, N=n, D=self.head,
            num_warps=self._warps(), num_stages=2, **self.common,
        )  # fmt: skip
        for name, part_sums in partial.items():
            out = wanted[name]
            if part_sums is not None and out is not None:
                total = self._unpad(part_sums.sum(0))
                out.copy_(total[:, : out.shape[1]] if out.ndim == 3 else total)

    def _walk(
        self, by_query: bool, near: Tensor | None, w_near: Tensor | None,
        bias_near: Tensor | None, far_side: Operand, scale: float, numbers: Tensor,
        sums: Tensor | None,
    ) -> None:  # fmt: skip
        """Launch `small_kernels.pair_walk`. Without `sums` it writes `numbers` (SCORE)."""
        block = self._block()
        most, part_batch, parts = self._rows_of_tile(block)
        groups = self._groups(by_query, False, most, 0)
        near, w_near, bias_near = self._padded(near, w_near, bias_near)
        far, w_far, bias_far = self._padded(*far_side)
        tokens = (self.queries, self.keys)[:: 1 if by_query else -1]
        strides = (self.keys, 1)[:: 1 if by_query else -1]
        launch(
            pair_walk,
            (len(groups.members) * parts, self._parts(by_query) if sums is None else len(sums)),
            near, far, w_near, w_far, bias_near, bias_far, numbers, sums, groups.members,
            groups.classes, groups.links, groups.spans[0], self.batch, part_batch, parts,
            groups.size, *tokens, self.heads, *strides, scale,
            SCORE=sums is None, NEAR_W=w_near is not None, FAR_W=w_far is not None,
            NEAR_BIAS=bias_near is not None, FAR_BIAS=bias_far is not None,
            LONG=long(near, far), BLOCK_M=block,
            K_NEAR=self.columns if w_near is None else w_near.shape[-2], K_FAR=far.shape[-1],
            N=self.columns, D=self.head, num_warps=self._warps(), num_stages=3, **self.common,
        )  # fmt: skip

    # -- Padding to powers of two -----------------------------------------------------------------

    def _padded(self, x: Any, w: Tensor | None, b: Tensor | None) -> Any:
        """Pad the tokens, table and bias of one side with zeros to the size of a tile."""
        if w is None:
            return (None if x is None else self._pad(x)), None, None
        more = power(w.shape[-2], 16) - w.shape[-2]
        x = F.pad(x, (0, more)) if more and x is not None else x
        w = self._pad(F.pad(w, (0, 0, 0, more)) if more else w)
        return x, w, None if b is None else self._pad(b)

    def _pad(self, t: Tensor) -> Tensor:
        """Pad [..., heads · head_dim] to [..., columns]."""
        if self.head > self.width:
            t = F.pad(t.unflatten(-1, (self.heads, self.width)), (0, self.head - self.width))
            t = t.flatten(-2)
        more = self.columns - t.shape[-1]
        return F.pad(t, (0, more)) if more else t

    def _unpad(self, t: Tensor) -> Tensor:
        """The inverse of `_pad`."""
        t = t[..., : self.heads * self.head]
        if self.head == self.width:
            return t
        return t.unflatten(-1, (self.heads, self.head))[..., : self.width].flatten(-2)

    # -- How the work is divided ------------------------------------------------------------------

    def _parts(self, by_query: bool) -> int:
        """The number of programs that the pairs of a group of tokens are divided over."""
        if self.dry:
            return 1
        most, _, parts = self._rows_of_tile(self._block())
        count = len(self._groups(by_query, False, most, 0).members)
        return split_evenly(count * parts, 2 * self._slots(4), self.count // max(1, count) // 8)

    def _table_parts(self) -> int:
        """The number of programs that the rows of a class are divided over.

        With one, the program of the largest class (on a grid: offset 0) would still run when all
        others have finished.
        """
        if self.dry:
            return 1
        largest = max(b - a for a, b in itertools.pairwise(self.layout.pairs_on("cpu").starts))
        return min(8, max(1, largest * self.batch // (8 * self._block())))

    def _block(self) -> int:
        """Rows of a tile. In float32 they are fewer, since its products need more registers."""
        return 16 if interpreted() else ROWS if self._half else ROWS // 2

    def _table_rows(self, *widths: int) -> int:
        """Rows of a step of `class_tables`, which has two gradients in registers."""
        return self._block() if self._half or max(widths) <= 32 else 16

    def _warps(self) -> int:
        return 4 if self._half else 8

    @property
    def _half(self) -> bool:
        return self.dtype in (torch.bfloat16, torch.float16)
