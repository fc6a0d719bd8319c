"""Write files so that an interruption never leaves a partial file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_target", "umask", "whole_files", "write_whole"]


def write_whole(path: Path, save: Callable[[Path], object]) -> None:
    """Write a file completely or not at all.

    The content goes into a temporary file in the same folder, which then replaces `path` in one
    step. If `save` fails, an existing file at `path` stays as it was.

    Args:
        path: the file to write; its folder exists.
        save: a function that writes the content to the path that it receives.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save(Path(temporary))
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def check_target(name: str, path: Path) -> None:
    """Check that a file can be written, before a long computation whose result it will hold.

    Args:
        name: the argument that named the file, for messages.
        path: the file.

    Raises:
        ValueError: the path is a folder, or its folder does not exist or cannot be written to.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{name}: got {path}, want a path in a folder that exists")
    if path.is_dir():
        raise ValueError(f"{name}: got the folder {path}, want a file")
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(bytes(4096))  # a full disk still makes empty files
    except OSError as error:
        raise ValueError(f"{name}: {path} cannot be written: {error.strerror}") from None


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
    """Return the permission bits that this process removes from new files (the umask)."""
    value = os.umask(0)
    os.umask(value)
    return value
