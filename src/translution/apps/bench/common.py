"""What the commands share: their options, what a file of rows begins with, and how it is kept."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch

from ...utils.files import write_whole
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
    """Sizes, and whether causal: "7x7" -> (7, 7), False; "256c" -> (256,), True."""
    causal = text.strip().endswith("c")
    parts = text.strip().removesuffix("c").lower().replace("×", "x").split("x")
    if not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"grid: got {text!r}, want sizes such as 7x7, 256 or 256c (causal)")
    return tuple(int(part) for part in parts), causal


def grid_text(grid: tuple[int, ...] | list[int], causal: bool = False) -> str:
    """Sizes as a table tells them: "7×7", "256 causal"."""
    return "×".join(map(str, grid)) + (" causal" if causal else "")


def ints(name: str, text: str) -> list[int]:
    """Numbers of at least 1, divided by commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"{name}: got {text!r}, want numbers such as 16,64")
    return [int(part) for part in parts]


def check_file(name: str, file: str) -> None:
    """Refuse a file that can't be written, before anything runs; "" is none."""
    target = Path(file).absolute()
    if file and (target.is_dir() or not target.parent.is_dir()):
        raise ValueError(f"{name}: got {file}, want a file in a folder that exists")


def header(device: torch.device, command: str = "") -> dict[str, Any]:
    """What a file of rows begins with: the machine, the command, the date, and no rows yet."""
    return {
        "machine": {**machine(device.type), "commit": commit_here()},
        "command": command or " ".join(["translution", *sys.argv[1:]]),
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "rows": [],
    }


def machine_line(about: dict[str, Any]) -> str:
    """The machine in a line."""
    text = f"{about.get('gpu', about['cpu'])}, {about['threads']} threads, torch {about['torch']}"
    commit = about.get("commit")
    return f"{text}, translution {about['translution']}" + (f" ({commit})" if commit else "")


def keep(record: dict[str, Any], file: str) -> None:
    """Write what is measured so far, if asked to: after each row, so that an interrupted run keeps
    what is finished."""
    if file:
        text = json.dumps(record, indent=1)
        write_whole(Path(file), lambda path: path.write_text(text, "utf-8"))
