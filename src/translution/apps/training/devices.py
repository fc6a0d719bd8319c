"""Devices, processes and signals around Lightning. This module is quick to import."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch

__all__ = [
    "DEVICES",
    "REMEDY",
    "Diverged",
    "interruptible",
    "is_main_process",
    "pick_device",
    "quiet",
    "terminate",
]

DEVICES = ("auto", "cpu", "cuda", "mps")


REMEDY = (
    "want a smaller train.learning_rate, or train.clip (checkpoints that were written before are "
    "whole)"
)


class Diverged(ValueError):
    """A loss or weights that are infinite or not a number."""


def pick_device(name: str) -> str:
    """Choose a device: "cuda", "mps" or "cpu". "auto" is the first of them that this machine has.

    Raises:
        ValueError: a device that this machine does not have.
    """
    mps = getattr(torch.backends, "mps", None)
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": mps is not None and mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return next(device for device, here in available.items() if here)
    if not available.get(name):
        have = [device for device, here in available.items() if here]
        raise ValueError(f"device: got {name!r}, want one that this machine has: {have}")
    return name


def is_main_process() -> bool:
    """Whether this process prints and writes, of all that share a run."""
    from lightning.pytorch.utilities import rank_zero_only

    return not rank_zero_only.rank  # type: ignore[attr-defined]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's banners, tips and warnings in a block."""
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
    """Let Ctrl-C raise KeyboardInterrupt in a block, where Lightning would exit and ignore it."""
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
    """End the processes of a pool at once. Python has no public way to do so before 3.14."""
    for process in (pool._processes or {}).values():
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)
