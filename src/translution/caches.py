"""A cache of index tables whose size in bytes is bounded.

Operators read index tables, such as the list of pairs of a layout. A table is computed once and
then kept on the device that reads it. When the same shape comes again, the call computes no table,
does not wait for the host, and can be captured in a CUDA graph. The least recently used tables are
dropped first, so that a program with many shapes keeps as many tables as the bound allows.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["TABLES", "Cache", "cached"]

P = ParamSpec("P")
R = TypeVar("R")


class Cache:
    """A cache that drops the least recently used tables first. It can be shared by threads.

    Args:
        size: the bound on all tables together, in bytes. If eight times the largest table is more
            than this, that is the bound instead: one training step of a model reads up to about
            eight tables of one size, and would otherwise compute them again at every step.
        entries: the largest number of tables.

    Attributes:
        held: the bytes of all tables in the cache.
    """

    def __init__(self, size: int = 512 << 20, entries: int = 4096):
        self.size, self.entries = size, entries
        self.held = 0
        self._tables: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._captured: dict[Any, Any] = {}
        self._lock = threading.RLock()

    def get(self, key: Any, device: torch.device, make: Callable[[], Any]) -> Any:
        """Return the table of this key. If the cache does not hold it, compute it with `make`.

        Tables that are read while a CUDA graph is captured are never dropped, since the graph reads
        them by their address whenever it is replayed.

        Raises:
            RuntimeError: a CUDA graph is being captured and the cache does not hold the table.
        """
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        with self._lock:
            entry = self._tables.get(key)
            if entry is not None:
                self._tables.move_to_end(key)
            elif capturing:
                raise RuntimeError(
                    "a CUDA graph is being captured, and this shape is new: its index tables have "
                    "to be copied to the device first; call once before the capture"
                )
            else:
                table = make()
                entry = table, _bytes(table)
                self._tables[key] = entry
                self.held += entry[1]
                self._shrink()
            if capturing:
                self._captured[key] = entry[0]
        return entry[0]

    def _shrink(self) -> None:
        """Drop tables until the cache is within its bounds."""
        most = max(self.size, 8 * max(size for _, size in self._tables.values()))
        while len(self._tables) > 1 and (len(self._tables) > self.entries or self.held > most):
            self.held -= self._tables.popitem(last=False)[1][1]

    def clear(self) -> None:
        """Drop all tables except those of captured graphs."""
        with self._lock:
            self._tables.clear()
            self.held = 0

    def __len__(self) -> int:
        return len(self._tables)


def _bytes(table: Any) -> int:
    """The bytes of a tensor, a number, or nested tuples of them."""
    if isinstance(table, Tensor):
        return table.numel() * table.element_size()
    if isinstance(table, tuple):
        return sum(map(_bytes, table))
    return 32  # roughly what a Python number takes


TABLES = Cache()
"""All index tables of the library."""


def cached(make: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function of (geometry, device, ...) so that `TABLES` keeps what it returns.

    The caller must not write to the result. The function is called with positional arguments, which
    are hashable. A geometry with an attribute `spec` (a `Layout`) is looked up by that string,
    whose hash Python computes only once.
    """

    @functools.wraps(make)
    def get(*arguments: P.args, **keywords: P.kwargs) -> R:
        geometry, device, *more = arguments
        name = getattr(geometry, "spec", geometry)
        key = (make.__module__, make.__qualname__, name, device, *more)
        return TABLES.get(key, device, lambda: make(*arguments, **keywords))  # type: ignore[arg-type]

    return get
