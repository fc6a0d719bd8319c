"""Around Lightning: its device, its silence, and Ctrl-C. Light to import."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch

__all__ = ["DEVICES", "interruptible", "pick_device", "quiet", "terminate"]

DEVICES = ("auto", "cpu", "cuda", "mps")


def pick_device(name: str) -> str:
    """cuda, mps or cpu; "auto" takes the first of them that is there."""
    mps = getattr(torch.backends, "mps", None)
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": mps is not None and mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return next(device for device, here in there.items() if here)
    if name not in there or not there[name]:
        have = [device for device, here in there.items() if here]
        raise ValueError(f"device: got {name!r}, want one that this machine has: {have}")
    return name


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning without its banners, tips and warnings about loaders."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def interruptible() -> Iterator[None]:
    """Lightning turns Ctrl-C into an exit and ignores the next ones; make it Ctrl-C again."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    try:
        yield
    except SystemExit as exit_:
        if isinstance(exit_.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        if main and handler is not None:
            signal.signal(signal.SIGINT, handler)


def terminate(pool: ProcessPoolExecutor) -> None:
    """End the processes of a pool at once, in the middle of what they do."""
    for process in (pool._processes or {}).values():
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)
