"""Models beside the event loop: in one thread, the newest request of each page next."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

__all__ = ["Newest", "computed"]

R = TypeVar("R")
A = TypeVar("A")

# one at a time: a second would only slow the first, and `models.seen` wants it so
_THREAD = ThreadPoolExecutor(1, "models")


async def computed(work: Callable[..., A], *arguments: object) -> A:
    """What `work` returns, while the event loop goes on."""
    return await asyncio.get_running_loop().run_in_executor(
        _THREAD, functools.partial(work, *arguments)
    )


class Newest(Generic[R, A]):
    """Requests of one page: while one is worked on, of those that come only the newest waits.

    work: called in the thread with a request. done, failed: called in the event loop with what came
    of it.
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
        self._waiting = [request]
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._waiting:
                request = self._waiting.pop()
                try:
                    self.done(request, await computed(self.work, request))
                except Exception as error:  # a page tells it, and goes on
                    self.failed(error)
        finally:
            self._task = None

    def stop(self) -> None:
        self._waiting = []
