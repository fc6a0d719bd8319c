"""The option `--import` of commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .imports import import_files

__all__ = ["ImportOption"]


def _import(files: list[Path] | None) -> list[Path] | None:
    import_files([str(file) for file in files or []])
    return files


ImportOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--import",
        metavar="FILE",
        callback=_import,
        help="A Python file to execute first, which registers mixers or models of your own. Can be "
        "repeated.",
    ),
]
