"""The key and value cache of a causal layer, for text that is generated token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operands import Operand

__all__ = ["Cache", "append_to_cache"]


class Cache:
    """What one causal layer keeps of the tokens that it has seen.

    For a shared projection it keeps the projected keys or values. For a table it keeps the layer's
    inputs instead: each new query has another offset to an old token and so needs another matrix.
    The buffers double their size when they are full, so that copying costs a constant amount per
    token. Tokens that a window hides from all later queries are dropped.

    Args:
        reach: the largest distance that a query sees, in tokens; None is no limit.

    Attributes:
        length: the number of tokens that the layer has seen.
        dropped: the number of them that are no longer kept, because no later query sees them.
        held: the number that is kept.
    """

    def __init__(self, reach: int | None = None):
        self.reach, self.length = reach, 0
        self._recorded: int | None = None  # the first token that `crop` may still need
        # by name: the position of the token in the first row, and the rows
        self._buffers: dict[str, tuple[int, Tensor]] = {}

    @property
    def dropped(self) -> int:
        return 0 if self.reach is None else max(0, self.length - self.reach)

    @property
    def held(self) -> int:
        return self.length - self.dropped

    @property
    def batch(self) -> int:
        """The number of sequences; 0 before the first token."""
        return next((len(rows) for _, rows in self._buffers.values()), 0)

    def extend(self, name: str, x: Tensor) -> Tensor:
        """Append `x` to the rows with this name, and return all of them.

        Calling it again before `advance` gives the same result.

        Args:
            name: what the rows are, such as "k".
            x: [batch, new tokens, channels].

        Returns:
            [batch, held + new tokens, channels], a view that the next call may write to.

        Raises:
            ValueError: `x` needs a gradient, or the cache has another batch, number of channels,
                dtype or device.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("cache: gradients do not flow through it, want torch.no_grad()")
        keep = self.dropped if self._recorded is None else min(self._recorded, self.dropped)
        need = self.length - keep + x.shape[1]
        first, rows = self._buffers.get(name, (keep, x[:, :0]))
        here = (x.shape[0], x.shape[2], x.dtype, x.device)
        kept = (rows.shape[0], rows.shape[2], rows.dtype, rows.device)
        if here != kept:
            raise ValueError(
                f"cache: holds (batch, channels, dtype, device) {kept} as {name!r}, got {here}"
            )
        room = rows.shape[1]
        if first + room < self.length + x.shape[1] or room > 4 * need:
            old = rows[:, keep - first : self.length - first]
            first, rows = keep, x.new_empty(x.shape[0], 2 * need, x.shape[2])
            rows[:, : old.shape[1]] = old
            self._buffers[name] = first, rows
        start, end = self.length - first, self.length - first + x.shape[1]
        rows[:, start:end] = x
        return rows[:, self.dropped - first : end]

    def advance(self, tokens: int) -> None:
        """Count so many tokens, by which the rows of every name were extended, as seen."""
        self.length += tokens

    def record(self) -> None:
        """From now on keep what a window drops until `crop`, which can then take all of it back."""
        self._recorded = self.dropped

    def crop(self, tokens: int) -> None:
        """Forget the last tokens, so many of them.

        Speculative decoding uses it to take back the tokens that were not accepted.

        Raises:
            ValueError: the layer has not seen so many, or a window has dropped what the tokens
                before them see; `record` keeps it.
        """
        left = self.length - tokens
        first = 0 if self.reach is None else max(0, left - self.reach)
        if tokens < 0 or left < 0:
            raise ValueError(f"tokens: got {tokens}, want 0 to the {self.length} that were seen")
        if any(first < start for start, _ in self._buffers.values()):
            raise ValueError(
                f"tokens: got {tokens}, but a window has dropped what the others see; want "
                "cache.record() before the tokens that are taken back"
            )
        self.length = left
        if self._recorded is not None:
            self._recorded = self.dropped

    def select(self, sequences: Tensor) -> None:
        """Continue with these sequences of the batch (int64), in this order; repeats are allowed.

        Beam search uses it to keep the best continuations.
        """
        for name, (first, rows) in self._buffers.items():
            self._buffers[name] = first, rows.index_select(0, sequences.to(rows.device))


def append_to_cache(cache: Cache | None, name: str, new: Operand) -> Operand:
    """A key or value with the cached tokens before it; unchanged without a cache."""
    return new if cache is None else new._replace(x=cache.extend(name, new.x))
