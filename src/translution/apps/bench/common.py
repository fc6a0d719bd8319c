"""Functions that the benchmark commands share: reading options, and writing files of rows."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch

from ...utils.files import check_target, write_whole
from ...utils.measuring import commit_here, machine

__all__ = [
    "DTYPES",
    "check_file",
    "grid_text",
    "header",
    "ints",
    "keep",
    "machine_line",
    "parse_grid",
]

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16)}
DTYPES["float64"] = torch.float64


def parse_grid(text: str) -> tuple[tuple[int, ...], bool]:
    """Read a grid: "7x7" gives ((7, 7), False), and "256c" gives ((256,), True).

    Returns:
        The number of tokens along each axis, and whether the grid is causal.

    Raises:
        ValueError: the text is not a grid.
    """
    causal = text.strip().endswith("c")
    parts = text.strip().removesuffix("c").lower().replace("×", "x").split("x")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"grid: got {text!r}, want sizes such as 7x7, 256 or 256c (causal)")
    return tuple(int(part) for part in parts), causal


def grid_text(grid: tuple[int, ...] | list[int], causal: bool = False) -> str:
    """Write a grid for a table, such as "7×7" or "256 causal"."""
    return "×".join(map(str, grid)) + (" causal" if causal else "")


def ints(name: str, text: str) -> list[int]:
    """Read whole numbers of at least 1 that are separated by commas.

    Args:
        name: the option, for the message.
        text: the text, such as "16,64".

    Raises:
        ValueError: the text contains something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"{name}: got {text!r}, want numbers such as 16,64")
    return [int(part) for part in parts]


def check_file(name: str, file: str) -> None:
    """Check that a file can be written, before anything runs.

    Args:
        name: the option, for the message.
        file: the path, or "" for no file.

    Raises:
        ValueError: the path is a folder, or its folder does not exist.
    """
    if file:
        check_target(name, Path(file))


def header(device: torch.device, command: str = "") -> dict[str, Any]:
    """Begin a record of measurements: the machine, the command, the date, and an empty "rows".

    Args:
        device: the device that is measured.
        command: the command to record; "" takes the arguments of this process.
    """
    return {
        "machine": {**machine(device.type), "commit": commit_here()},
        "command": command or " ".join(["translution", *sys.argv[1:]]),
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "rows": [],
    }


def machine_line(about: dict[str, Any]) -> str:
    """Describe a machine, as `header` records it, in one line."""
    text = f"{about.get('gpu', about['cpu'])}, {about['threads']} threads, torch {about['torch']}"
    commit = about.get("commit")
    return f"{text}, translution {about['translution']}" + (f" ({commit})" if commit else "")


def keep(record: dict[str, Any], file: str) -> None:
    """Write a record as JSON; call it after each row, so that an interrupted run loses nothing.

    Args:
        record: the record, with its rows so far.
        file: the path, or "" to write nothing.
    """
    if file:
        text = json.dumps(record, indent=1)
        write_whole(Path(file), lambda path: path.write_text(text, "utf-8"))
