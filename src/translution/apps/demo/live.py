"""Run models in one thread besides the event loop, and only the newest request of each page."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

__all__ = ["Newest", "computed"]

R = TypeVar("R")
A = TypeVar("A")

# one thread: a second one would slow the first, and `models.seen` relies on a single thread
_THREAD = ThreadPoolExecutor(1, "models")


async def computed(work: Callable[..., A], *arguments: object) -> A:
    """Call `work` in the thread, and return its result; the event loop continues meanwhile."""
    return await asyncio.get_running_loop().run_in_executor(
        _THREAD, functools.partial(work, *arguments)
    )


class Newest(Generic[R, A]):
    """The requests of one page. While one is computed, only the newest of the others waits.

    Args:
        work: called in the thread with a request; it returns the answer.
        done: called in the event loop with a request and its answer.
        failed: called in the event loop with the exception of a request that failed.
    """

    def __init__(
        self,
        work: Callable[[R], A],
        done: Callable[[R, A], None],
        failed: Callable[[Exception], None],
    ):
        self.work, self.done, self.failed = work, done, failed
        self._waiting: list[R] = []
        self._task: asyncio.Task[None] | None = None

    def ask(self, request: R) -> None:
        """Add a request; it replaces one that waits."""
        self._waiting = [request]
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._waiting:
                request = self._waiting.pop()
                try:
                    self.done(request, await computed(self.work, request))
                except Exception as error:  # the page shows it and continues
                    self.failed(error)
        finally:
            self._task = None

    def stop(self) -> None:
        """Drop a request that waits."""
        self._waiting = []
