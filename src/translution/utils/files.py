"""Writing files completely or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["umask", "whole_files", "write_whole"]


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


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move to `folder` after the block; none of them after an error.

    Args:
        folder: is created if it does not exist. Files of other names stay in it.

    Raises:
        OSError: the folder cannot be written.
    """
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder, prefix=".new-"))
    try:
        yield new
        files = sorted(new.iterdir())
        for file in files:
            file.chmod(0o666 & ~umask())
        for file in files:
            os.replace(file, folder / file.name)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if not existed:
            folder.rmdir()
        raise
    new.rmdir()


def umask() -> int:
    """What this process takes from the rights of new files."""
    value = os.umask(0)
    os.umask(value)
    return value
