"""The library's operators as modules of plain torch operations, for export to other software.

A traced model calls operators that only this library defines. `portable` replaces them with these
modules, which compute the same with gathers and matrix products, and hold their indices as buffers.
They are meant for inference; their backward pass would need much memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import functional  # noqa: F401  (registers the operators)
from ...layouts import Layout
from ...neighborhoods import Neighborhood

__all__ = ["PLAIN", "Attention", "Index", "Mix", "NeighborhoodMix", "Positions", "Scores"]

NUMBERS = 1 << 22
"""The most numbers per sample that one projection of a group's pairs may have.

This is 16 MiB in float32."""

TABLE = 1 << 24
"""The most numbers that the matrices of a group's classes may have (64 MiB in float32)."""

_CPU = torch.device("cpu")


class Group(NamedTuple):
    """Offset classes that one batched product takes, each padded to the pairs of the largest.

    Attributes:
        classes: the numbers of the classes.
        query, key: the query and the key of each pair, [classes * size]; 0 in the padding.
        flat: the index of each pair in the dense scores [queries * keys]; in the padding, the
            number of these scores.
    """

    classes: Tensor
    query: Tensor
    key: Tensor
    flat: Tensor


def groups(layout: Layout, channels: int, matrix: int) -> list[Group]:
    """Divide the offset classes of a layout into groups, with padding for less than half of it.

    Args:
        layout: the layout of the pairs.
        channels: numbers per pair in a projection.
        matrix: numbers per class in a table.

    Returns:
        groups within which the largest class has less than twice the pairs of the smallest.
    """
    pairs = layout.pairs_on(_CPU)
    spans = [(stop - start, c) for c, (start, stop) in enumerate(itertools.pairwise(pairs.starts))]
    spans = sorted(span for span in spans if span[0])
    made, begin = list[Group](), 0
    cells = layout.n_queries * layout.n_keys
    for end in range(1, len(spans) + 1):
        if end < len(spans):
            size, count = spans[end][0], end + 1 - begin
            small = size * count * channels <= NUMBERS and count * matrix <= TABLE
            if small and size < 2 * spans[begin][0]:
                continue
        size, classes = spans[end - 1][0], [c for _, c in spans[begin:end]]
        table = torch.full((len(classes), size), -1)
        for row, c in zip(table, classes, strict=True):
            start, stop = pairs.starts[c : c + 2]
            row[: stop - start] = torch.arange(start, stop)
        at, absent = table.flatten().clamp(min=0), table.flatten() < 0
        query, key, flat = (t.long()[at] for t in (pairs.query, pairs.key, pairs.flat))
        made.append(
            Group(
                torch.tensor(classes),
                query.masked_fill(absent, 0),
                key.masked_fill(absent, 0),
                flat.masked_fill(absent, cells),
            )
        )
        begin = end
    return made


class _Grouped(nn.Module):
    """A module that holds the groups of a layout as buffers."""

    def __init__(self, layout: Layout | str, heads: int, channels: int, matrix: int):
        super().__init__()
        self.layout = Layout.parse(layout) if isinstance(layout, str) else layout
        self.heads, self.groups = heads, groups(self.layout, channels, matrix)
        for i, group in enumerate(self.groups):
            for name, value in group._asdict().items():
                self.register_buffer(f"{name}{i}", value)

    def buffered_groups(self) -> Iterator[Group]:
        """The groups, as the buffers that move with the module."""
        for i in range(len(self.groups)):
            yield Group(*(getattr(self, f"{name}{i}") for name in Group._fields))


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of sums: float32 for half precision, else that of x."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor. Without need no conversion is traced: each takes time in every exporter."""
    return x if x.dtype == dtype else x.to(dtype)


def _project(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, classes: Tensor, tokens: Tensor
) -> Tensor:
    """Project one side of the pairs of a group.

    Args:
        x: [tokens, batch, channels]; projected already if `weight` is None.
        weight: a table [all classes, channels, heads * head_dim], or None.
        bias: [all classes, heads * head_dim], or None.
        classes: the classes of the group.
        tokens: the token of each pair, on this side.

    Returns:
        [pairs, batch, heads * head_dim].
    """
    rows = x.index_select(0, tokens)
    if weight is None:
        return rows
    count = len(classes)
    size = len(tokens) // count
    table = _cast(weight.index_select(0, classes), x.dtype)
    y = torch.bmm(rows.reshape(count, -1, rows.shape[-1]), table)
    if bias is not None:
        y = y + _cast(bias.index_select(0, classes)[:, None], x.dtype)
    return y.reshape(count * size, -1, y.shape[-1])


class Scores(_Grouped):
    """The operator `translution::offset_scores`.

    Args:
        layout: the layout of the pairs.
        heads, scale: as in `functional.offset_scores`.
        channels: heads * head_dim, which limits the size of the groups.
        matrix: the numbers of one entry of a table, which limits it too.
    """

    slot: Tensor

    def __init__(
        self, layout: Layout | str, heads: int, scale: float, channels: int, matrix: int = 0
    ):
        super().__init__(layout, heads, channels, matrix)
        self.scale = scale
        slot = torch.full((self.layout.n_queries * self.layout.n_keys + 1,), -1)
        at = 0
        for group in self.groups:
            slot[group.flat] = torch.arange(at, at + len(group.flat))
            at += len(group.flat)
        self.register_buffer("slot", torch.where(slot < 0, at, slot)[:-1])

    def forward(
        self,
        xq: Tensor,
        xk: Tensor,
        wq: Tensor | None,
        wk: Tensor | None,
        bq: Tensor | None = None,
        bk: Tensor | None = None,
    ) -> Tensor:
        q, k = xq.transpose(0, 1), xk.transpose(0, 1)
        scores = []
        for group in self.buffered_groups():
            left = _cast(_project(q, wq, bq, group.classes, group.query), _wide(q))
            right = _cast(_project(k, wk, bk, group.classes, group.key), _wide(q))
            scores.append((left * right).unflatten(-1, (self.heads, -1)).sum(-1) * self.scale)
        absent = q.new_full((1, q.shape[1], self.heads), float("-inf"), dtype=_wide(q))
        cells = torch.cat([*scores, absent]).index_select(0, self.slot)
        cells = cells.unflatten(0, (self.layout.n_queries, self.layout.n_keys))
        return cells.permute(2, 3, 0, 1).contiguous()


class Mix(_Grouped):
    """The operator `translution::offset_mix`. The arguments are those of `Scores`."""

    def __init__(self, layout: Layout | str, heads: int, channels: int, matrix: int):
        super().__init__(layout, heads, channels, matrix)
        queries = torch.arange(self.layout.n_queries, device=_CPU)
        self.in_order = [group.query.equal(queries) for group in self.groups]

    def forward(self, a: Tensor, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        wide, value = _wide(x), x.transpose(0, 1)
        cells = _cast(a.permute(2, 3, 0, 1).flatten(0, 1), wide)
        cells = torch.cat([cells, cells.new_zeros(1, x.shape[0], self.heads)])  # for the padding
        out = x.new_zeros(self.layout.n_queries, x.shape[0], w.shape[-1], dtype=wide)
        for group, in_order in zip(self.buffered_groups(), self.in_order, strict=True):
            rows = _cast(_project(value, w, b, group.classes, group.key), wide)
            rows = rows.unflatten(-1, (self.heads, -1))
            rows = rows * cells.index_select(0, group.flat).unsqueeze(-1)
            rows = rows.flatten(2)
            # onnxscript turns an index_add into all rows in order into a copy, so add here instead
            out = out + rows if in_order else out.index_add(0, group.query, rows)
        return _cast(out.transpose(0, 1), x.dtype).contiguous()


class _Constant(nn.Module):
    value: Tensor

    def __init__(self, value: Tensor):
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, like: Tensor) -> Tensor:
        return self.value.clone()


class Index(_Constant):
    """The operator `translution::layout_index`."""

    def __init__(self, layout: Layout | str):
        super().__init__((Layout.parse(layout) if isinstance(layout, str) else layout).index)


class Positions(_Constant):
    """The operator `translution::layout_positions`."""

    def __init__(self, layout: Layout | str):
        layout = Layout.parse(layout) if isinstance(layout, str) else layout
        super().__init__(layout.positions(_CPU))


class Attention(nn.Module):
    """The operator `translution::neighborhood_attention`, for all tiles of all heads at once."""

    query_index: Tensor
    key_index: Tensor
    query_slot: Tensor
    log_times: Tensor

    def __init__(self, area: Neighborhood, scale: float, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.scale, self.out = scale, area.out
        tiles = area.tiles(_CPU, dtype)
        self.shapes = ((tiles.count, tiles.queries), (tiles.count, tiles.keys))
        for name in ("query_index", "key_index", "query_slot", "log_times"):
            self.register_buffer(name, getattr(tiles, name).clone())

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = self.scores(query, key).softmax(-1)
        v = self._gather(value, self.key_index, self.shapes[1])
        return _cast(self.as_map(weights @ v), value.dtype)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """[batch, heads, tiles, queries of a tile, keys of a tile]."""
        q = self._gather(query, self.query_index, self.shapes[0]) * self.scale
        k = self._gather(key, self.key_index, self.shapes[1])
        return q @ k.transpose(-1, -2) + self.log_times

    def as_map(self, y: Tensor) -> Tensor:
        """The queries of all tiles in their places on the map."""
        return y.flatten(2, 3).index_select(2, self.query_slot).unflatten(2, self.out)

    @staticmethod
    def _gather(x: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
        return _cast(x.flatten(2, 3).index_select(2, index), _wide(x)).unflatten(2, shape)


class LogSumExp(Attention):
    """The operator `translution::neighborhood_logsumexp`."""

    def forward(self, query: Tensor, key: Tensor) -> Tensor:  # type: ignore[override]
        return self.as_map(self.scores(query, key).logsumexp(-1))


class NeighborhoodMix(nn.Module):
    """The operator `translution::neighborhood_mix`, for one row of the kernel at a time."""

    rows: Tensor
    columns: Tensor

    def __init__(self, area: Neighborhood):
        super().__init__()
        self.area = area
        for axis, name in enumerate(("rows", "columns")):
            neighbors = [area.neighbors(axis, query) for query in range(area.out[axis])]
            self.register_buffer(name, torch.tensor(neighbors, device=_CPU).t().contiguous())

    def forward(self, weights: Tensor, value: Tensor) -> Tensor:
        area, wide, (_, across) = self.area, _wide(value), self.area.kernel
        by = _cast(weights, wide).unflatten(2, area.kernel).unsqueeze(1)
        y: Any = 0
        for row in range(area.kernel[0]):
            x = value.index_select(2, self.rows[row]).index_select(3, self.columns.flatten())
            x = _cast(x, wide).unflatten(3, (across, area.out[1]))
            x = x.unflatten(1, (-1, weights.shape[1]))
            y = y + (x * by[:, :, :, row].transpose(3, 4)).sum(4)
        return _cast(y.flatten(1, 2), value.dtype)


# -- functions from an operator's arguments to its module and the number of its tensor arguments ---


def _scores(xq, xk, wq, wk, bq, bk, heads, scale, layout, *_):  # type: ignore[no-untyped-def]
    shape = next(w.shape for w in (wq, wk) if w is not None)
    return Scores(layout, heads, scale, shape[-1], shape[-2] * shape[-1]), 6


def _mix(a, x, w, b, layout, *_):  # type: ignore[no-untyped-def]
    return Mix(layout, a.shape[1], w.shape[-1], w.shape[-2] * w.shape[-1]), 4


def _attention(query, key, value, kernel, stride, dilation, scale, *_):  # type: ignore[no-untyped-def]
    area = Neighborhood(tuple(key.shape[2:4]), tuple(kernel), tuple(stride), tuple(dilation))
    return Attention(area, scale, _wide(query)), 3


def _logsumexp(query, key, kernel, stride, dilation, scale, *_):  # type: ignore[no-untyped-def]
    area = Neighborhood(tuple(key.shape[2:4]), tuple(kernel), tuple(stride), tuple(dilation))
    return LogSumExp(area, scale, _wide(query)), 2


def _neighborhood_mix(weights, value, kernel, stride, dilation):  # type: ignore[no-untyped-def]
    area = Neighborhood(tuple(value.shape[2:]), tuple(kernel), tuple(stride), tuple(dilation))
    return NeighborhoodMix(area), 2


_ops = torch.ops.translution
PLAIN = {
    _ops.offset_scores.default: _scores,
    _ops.offset_mix.default: _mix,
    _ops.neighborhood_attention.default: _attention,
    _ops.neighborhood_logsumexp.default: _logsumexp,
    _ops.neighborhood_mix.default: _neighborhood_mix,
    _ops.layout_index.default: lambda like, layout: (Index(layout), 1),
    _ops.layout_positions.default: lambda like, layout: (Positions(layout), 1),
}
"""For each operator, a function that makes the module that replaces a call of it.

It takes the arguments of the call, with fake tensors, and returns the module and the number of
leading arguments that the module takes."""
