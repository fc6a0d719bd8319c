"""What a causal layer remembers of the tokens before, so that new ones don't need them again."""

from __future__ import annotations

import torch
from torch import Tensor

from .projections import Projected

__all__ = ["Cache", "remember"]


class Cache:
    """The memory of one causal layer between calls.

    It holds what a key or value is made from: of a shared projection its result, of a relative one
    the layer's inputs, since each new query stands at another offset and takes another matrix. The
    room doubles when it is full, so that all copying together is of the order of the tokens. Where
    a window ends, tokens are dropped.

    Args:
        reach: the farthest that a query sees, in tokens; None is no limit.

    Attributes:
        length: tokens that the layer has seen.
        dropped: how many of them no later query can see; they are not kept.
        held: how many are kept.
    """

    def __init__(self, reach: int | None = None):
        self.reach, self.length = reach, 0
        self._kept: dict[str, tuple[int, Tensor]] = {}  # the token in the first row, the rows

    @property
    def dropped(self) -> int:
        return 0 if self.reach is None else max(0, self.length - self.reach)

    @property
    def held(self) -> int:
        return self.length - self.dropped

    @property
    def batch(self) -> int:
        """Texts, 0 before the first token."""
        return next((len(rows) for _, rows in self._kept.values()), 0)

    def extend(self, name: str, x: Tensor) -> Tensor:
        """What is kept under this name, then `x`; doing it again before `advance` changes nothing.

        Args:
            name: what `x` is, such as "k".
            x: [batch, new tokens, channels].

        Returns:
            [batch, held + new tokens, channels], a view that the next call may write to.

        Raises:
            ValueError: gradients are wanted, or another batch, width, dtype or device is kept.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("cache: gradients do not flow through it, want torch.no_grad()")
        need = self.held + x.shape[1]
        first, rows = self._kept.get(name, (self.dropped, x[:, :0]))
        here = (x.shape[0], x.shape[2], x.dtype, x.device)
        kept = (rows.shape[0], rows.shape[2], rows.dtype, rows.device)
        if here != kept:
            raise ValueError(
                f"cache: holds (batch, channels, dtype, device) {kept} as {name!r}, got {here}"
            )
        room = rows.shape[1]
        if first + room < self.length + x.shape[1] or room > 4 * need:
            old = rows[:, self.dropped - first : self.length - first]
            first, rows = self.dropped, x.new_empty(x.shape[0], 2 * need, x.shape[2])
            rows[:, : self.held] = old
            self._kept[name] = first, rows
        start, end = self.length - first, self.length - first + x.shape[1]
        rows[:, start:end] = x
        return rows[:, self.dropped - first : end]

    def advance(self, tokens: int) -> None:
        """The tokens that every name was extended by have been seen."""
        self.length += tokens

    def select(self, texts: Tensor) -> None:
        """Go on with these texts of the batch, int64, in this order; one may come several times."""
        for name, (first, rows) in self._kept.items():
            self._kept[name] = first, rows.index_select(0, texts.to(rows.device))


def remember(cache: Cache | None, name: str, side: Projected) -> Projected:
    """A key's or value's side with what the cache holds before it; without a cache, as it is."""
    return side if cache is None else side._replace(x=cache.extend(name, side.x))
