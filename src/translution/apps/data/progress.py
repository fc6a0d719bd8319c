"""A progress bar for the preparation of data, on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

__all__ = ["ByteProgress", "bars_on_terminals"]


def bars_on_terminals() -> None:
    """Let the library datasets draw its progress bars on terminals only."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


class ByteProgress:
    """A progress bar over bytes of text, drawn on standard error if that is a terminal.

    Entering the context gives a function that is called with the number of bytes just done. The bar
    appears at its first call and is removed at the end.

    Args:
        label: the text in front of the bar.
        total: the number of bytes in all, or None if it is unknown.
        show: False draws nothing.
    """

    def __init__(self, label: str, total: int | None, show: bool) -> None:
        self.label, self.total, self.show = label, total, show
        self.bar: Any = None

    def __enter__(self) -> Callable[[int], None]:
        return self._advance

    def _advance(self, done: int) -> None:
        if not self.show:
            return
        if self.bar is None:
            from rich import progress
            from rich.console import Console

            console = Console(stderr=True)
            self.show = console.is_terminal
            self.bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TimeElapsedColumn(),
                console=console,
                transient=True,
                disable=not self.show,
            )
            self.task = self.bar.add_task(self.label, total=self.total)
            self.bar.start()
        self.bar.update(self.task, advance=done)

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()
