"""Writing files so that nothing written is lost."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["umask", "write_whole"]


def write_whole(path: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write a temporary file beside `path`, then put it there: all of it or nothing."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save(Path(temporary))
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def umask() -> int:
    """What this process takes from the rights of new files."""
    value = os.umask(0)
    os.umask(value)
    return value
