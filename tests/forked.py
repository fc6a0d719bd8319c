"""Processes that start quickly, for tests that kill one, fill its disk or need its own streams.

They are forked from a server that has imported the library and has run nothing, because importing
it takes seconds. (The process of the tests may have threads, and a fork of it would wait for ever
for a lock that one of them held.)
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

# Installed modules only: before Python 3.13 the server does not get this process's sys.path, and it
# passes over what it cannot import.
IMPORTED = [
    "translution.apps.cli", "translution.apps.experiments.making", "translution.apps.published",
    "datasets", "kornia", "sklearn.datasets", "torch.utils.tensorboard",
]  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")


def start(function: Callable, *arguments) -> multiprocessing.Process:
    """Start a function in a process of its own."""
    CONTEXT.set_forkserver_preload(IMPORTED)
    process = CONTEXT.Process(target=_call, args=(function, *arguments))
    process.start()
    return process


def exit_code(function: Callable, *arguments, timeout: float = 120) -> int:
    """Run a function in a process of its own, and return the process's exit code."""
    process = start(function, *arguments)
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"{function} has not ended after {timeout} seconds")
    return process.exitcode


def command(*words: object, before: Callable[[], object] | None = None) -> tuple[int, str, str]:
    """Run a command of the library in a process of its own, with files as its streams.

    Args:
        words: the words of the command line after "translution".
        before: a function that the process calls first.

    Returns:
        The exit code, what the command wrote, and its errors.
    """
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("out", "err")]
        code = exit_code(main, [*map(str, words)], before, streams)
        out, err = (path.read_text("utf-8", "replace") for path in streams)
    return code, out, err


def main(
    words: list[str], before: Callable[[], object] | None = None, streams: Sequence[Path] = ()
) -> None:
    """Run a command in this process, which `start` made, with files as its streams."""
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    if before is not None:
        before()
    from translution.apps import cli

    sys.argv = ["translution", *words]
    cli.main()


def full_disk(size: int) -> None:
    """Limit files to a size in bytes, with the same error as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def as_in_tests() -> None:
    """Make the settings of conftest.py in this process, so that its numbers are the same."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def _call(function: Callable, *arguments) -> None:
    as_in_tests()
    function(*arguments)
