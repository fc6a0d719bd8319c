"""A cache of index tables that is bounded in bytes.

Which pairs a layout has, and in which order a backend walks them, is worked out once and kept, on
the device that reads it. Then the same shape costs nothing when it comes again, no call waits for
the host, and a step can be captured in a CUDA graph. What was used last stays; a program that meets
many shapes keeps as many of them as the bound allows.
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
    """The tables that were used last.

    Args:
        size: bytes that they may take together. Where eight of the largest table need more, they
            may take that: a step of one model uses no more tables than these, and it would
            otherwise make them again each time.
        entries: tables at most.
    """

    def __init__(self, size: int = 512 << 20, entries: int = 4096):
        self.size, self.entries = size, entries
        self.held = 0
        """bytes of all tables in the cache"""
        self._made: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._captured: dict[Any, Any] = {}
        self._lock = threading.RLock()

    def get(self, key: Any, device: torch.device, make: Callable[[], Any]) -> Any:
        """What `make` gives for this key, made now or before.

        Tables that are used while a CUDA graph is captured are kept for good, since the graph reads
        them by their address whenever it is replayed.

        Raises:
            RuntimeError: a CUDA graph is being captured and the key is new.
        """
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        with self._lock:
            found = self._made.get(key)
            if found is not None:
                self._made.move_to_end(key)
            elif capturing:
                raise RuntimeError(
                    "a CUDA graph is being captured, and this shape is new: its index tables have "
                    "to be copied to the device first; call once before the capture"
                )
            else:
                made = make()
                found = made, _bytes(made)
                self._made[key] = found
                self.held += found[1]
                self._shrink()
            if capturing:
                self._captured[key] = found[0]
        return found[0]

    def _shrink(self) -> None:
        most = max(self.size, 8 * max(size for _, size in self._made.values()))
        while len(self._made) > 1 and (len(self._made) > self.entries or self.held > most):
            self.held -= self._made.popitem(last=False)[1][1]

    def clear(self) -> None:
        """Drop everything but the tables of captured graphs."""
        with self._lock:
            self._made.clear()
            self.held = 0

    def __len__(self) -> int:
        return len(self._made)


def _bytes(found: Any) -> int:
    """Bytes of the tensors and numbers in nested tuples."""
    if isinstance(found, Tensor):
        return found.numel() * found.element_size()
    if isinstance(found, tuple):
        return sum(map(_bytes, found))
    return 32  # a number of Python, about


TABLES = Cache()
"""All index tables of the library."""


def cached(make: Callable[P, R]) -> Callable[P, R]:
    """Keep in `TABLES` what a function of (geometry, device, ...) returns. Do not write to it.

    The geometry is hashable or has a `key`; all arguments are given by place.
    """

    @functools.wraps(make)
    def get(*arguments: P.args, **keywords: P.kwargs) -> R:
        geometry, device, *more = arguments
        name = getattr(geometry, "key", geometry)
        key = (make.__module__, make.__qualname__, name, device, *more)
        return TABLES.get(key, device, lambda: make(*arguments, **keywords))  # type: ignore[arg-type]

    return get
