"""The order in which the plain torch backend computes pairs: classes in groups of bounded size.

A group holds the pairs of a few small classes, or of a part of a large one. `offset.py` computes
one group after another. B batch, P pairs, C channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...caches import cached
from ...layouts import Layout

__all__ = ["ELEMENTS", "Gradients", "Group", "Order", "Segment", "groups", "order_of", "sum_dtype"]

ELEMENTS = 98304
"""How many numbers (rows · channels) a group has, about. This is enough that the work around the
matrix products takes little time, and few enough that the numbers stay in a CPU's cache."""
ROWS = 512
"""A group has at least this many rows (if there are as many). With fewer, a matrix product does not
reach its full speed."""
HALF_TIMES = 4
"""In half precision a group has this many times more numbers. The products are so fast there that
the cost of each call counts."""


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of this dtype are summed: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Gradients:
    """The gradients of one side of the pairs.

    Attributes:
        x, weight, bias: as in `Operand`; None where they are not wanted.
    """

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @property
    def wanted(self) -> bool:
        """Whether any gradient of this side is wanted."""
        return not (self.x is None and self.weight is None and self.bias is None)

    @staticmethod
    def returned(like: Tensor, *gradients: Tensor | None) -> tuple[Tensor, ...]:
        """The gradients as a registered operator returns them.

        It returns tensors, and no tensor twice. So each unwanted gradient is an empty tensor of its
        own, of the dtype and device of `like`.
        """
        return tuple(like.new_empty(0) if g is None else g for g in gradients)


# -- The order in which the pairs are computed -----------------------------------------------------
#
# One matrix product per class would be the plain way. On a grid, however, most classes are small
# and many have equally many pairs: opposite offsets, for example, always do. Classes of equal size
# can be multiplied by one batched product. On a CPU, its cores then work on a matrix each, which is
# faster than dividing one small matrix among them. In half precision, where the call itself costs
# as much as a small product, there is also one call in place of several.


class Segment(NamedTuple):
    """The rows of a group that are multiplied in one call.

    They belong to one class, to several classes of equal size one after another, or to a part of
    one large class.

    Attributes:
        classes: the classes.
        start, stop: the rows are `start : stop` of the group.
        first: whether no earlier segment has rows of these classes.
        last: whether no later segment has rows of these classes.
    """

    classes: tuple[int, ...]
    start: int
    stop: int
    first: bool
    last: bool

    def by_class(self, rows: Tensor) -> Tensor:
        """Divide [rows, C] by class: [classes, rows of each, C]. One class stays [rows, C]."""
        return rows if len(self.classes) == 1 else rows.unflatten(0, (len(self.classes), -1))


class Group(NamedTuple):
    """Pairs whose projected rows exist at the same time: some small classes, or a part of a large
    one.

    Attributes:
        pairs: a slice of the pairs of `Order`.
        segments: its rows, divided by the calls that multiply them.
    """

    pairs: slice
    segments: list[Segment]

    @property
    def sizes(self) -> list[int]:
        """The number of rows of each segment."""
        return [segment.stop - segment.start for segment in self.segments]


class Order(NamedTuple):
    """The pairs of a layout sorted by the size of their class, and within a size by class.

    This is `Pairs` in another order, in which classes of equal size are neighbours.

    Attributes:
        query, key, flat, slot: as in `Pairs`.
        runs: for each size, its classes and their first pair. A last entry ((), P) marks the end.
        empty: the classes without a pair.
    """

    query: Tensor
    key: Tensor
    flat: Tensor
    slot: Tensor
    runs: tuple[tuple[tuple[int, ...], int], ...]
    empty: tuple[int, ...]


@cached
def order_of(layout: Layout, device: torch.device) -> Order:
    pairs = layout.pairs_on(device)
    sizes = [stop - start for start, stop in itertools.pairwise(pairs.starts)]
    classes = sorted((c for c, size in enumerate(sizes) if size), key=sizes.__getitem__)
    runs, indices, start = list[tuple[tuple[int, ...], int]](), list[Tensor](), 0
    for size, equally_large in itertools.groupby(classes, sizes.__getitem__):
        runs.append((tuple(equally_large), start))
        indices += [torch.arange(pairs.starts[c], pairs.starts[c] + size) for c in runs[-1][0]]
        start += size * len(runs[-1][0])
    runs.append(((), start))
    order = torch.cat(indices).to(device) if indices else pairs.query.new_empty(0).long()
    query, key, flat = (t.index_select(0, order) for t in (pairs.query, pairs.key, pairs.flat))
    slot = torch.full_like(pairs.slot, start)  # the cells of absent pairs keep this value, P
    slot[flat.long()] = torch.arange(start, device=device, dtype=slot.dtype)
    empty = tuple(cls for cls, size in enumerate(sizes) if not size)
    return Order(query, key, flat, slot, tuple(runs), empty)


def groups(order: Order, x: Tensor) -> Iterator[Group]:
    """Divide the pairs into groups, for operands like `x` [B, tokens, C]."""
    batch, _, channels = x.shape
    if not batch:
        return
    half = x.dtype != sum_dtype(x.dtype)
    elements = ELEMENTS * (HALF_TIMES if half else 1)
    most = max(1, max(ROWS, elements // max(channels, 1)) // batch)  # pairs of a group
    # In full precision a call takes at most two classes, whose matrices it can read in place (see
    # `_entries`). In half precision their matrices are copied next to each other, which is worth it
    # for as many as make up the elements of a group.
    together = max(2, elements // max(channels, 1) ** 2) if half else 2
    begin, segments = 0, list[Segment]()
    for classes, start, stop in _calls(order, most, together):
        if stop - begin > most and segments:
            yield Group(slice(begin, start), segments)
            begin, segments = start, []
        first = start
        while start < stop:  # a class that is too large for one group is divided
            end = stop if len(classes) > 1 else min(start + most, stop)
            rows = (start - begin) * batch, (end - begin) * batch
            segments.append(Segment(classes, *rows, start == first, end == stop))
            if end < stop:
                yield Group(slice(begin, end), segments)
                begin, segments = end, []
            start = end
    if segments:
        yield Group(slice(begin, order.runs[-1][1]), segments)


def _calls(order: Order, most: int, together: int) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """The classes that are multiplied in one call, with their pairs `start : stop`.

    Args:
        order: the pairs.
        most: the number of pairs of a group.
        together: the largest number of classes of a call.
    """
    for (classes, start), (_, stop) in itertools.pairwise(order.runs):
        size = (stop - start) // len(classes)
        # Two classes of nearly `most` pairs each are still multiplied together, although they make
        # a group of nearly twice as many: two cores then have one each.
        count = 1 if size > most else min(together, max(2, most // size))
        for i in range(0, len(classes), count):
            part = classes[i : i + count]
            yield part, start + i * size, start + (i + len(part)) * size


# -- One side of the pairs and its gradients -------------------------------------------------------
