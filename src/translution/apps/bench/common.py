"""What the commands share: their options, what a file of rows begins with, and how it is kept."""

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
    "header",
    "ints",
    "keep",
    "parse_grid",
    "told_grid",
    "told_machine",
]

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16)}
DTYPES["float64"] = torch.float64


def parse_grid(text: str) -> tuple[tuple[int, ...], bool]:
    """Sizes, and whether causal: "7x7" -> (7, 7), False; "256c" -> (256,), True."""
    causal = text.strip().endswith("c")
    parts = text.strip().removesuffix("c").lower().replace("×", "x").split("x")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"grid: got {text!r}, want sizes such as 7x7, 256 or 256c (causal)")
    return tuple(int(part) for part in parts), causal


def told_grid(grid: tuple[int, ...] | list[int], causal: bool = False) -> str:
    """Sizes as a table tells them: "7×7", "256 causal"."""
    return "×".join(map(str, grid)) + (" causal" if causal else "")


def ints(name: str, text: str) -> list[int]:
    """Numbers of at least 1, divided by commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"{name}: got {text!r}, want numbers such as 16,64")
    return [int(part) for part in parts]


def check_file(name: str, file: str) -> None:
    """Refuse a file that can't be written, before anything runs; "" is none."""
    if file:
        check_target(name, Path(file))


def header(device: torch.device, command: str = "") -> dict[str, Any]:
    """What a file of rows begins with: the machine, the command, the date, and no rows yet."""
    return {
        "machine": {**machine(device.type), "commit": commit_here()},
        "command": command or " ".join(["translution", *sys.argv[1:]]),
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "rows": [],
    }


def told_machine(about: dict[str, Any]) -> str:
    """The machine in a line."""
    told = f"{about.get('gpu', about['cpu'])}, {about['threads']} threads, torch {about['torch']}"
    commit = about.get("commit")
    return f"{told}, translution {about['translution']}" + (f" ({commit})" if commit else "")


def keep(told: dict[str, Any], file: str) -> None:
    """Write what is measured so far, if asked to: after each row, so that an interrupted run keeps
    what is finished."""
    if file:
        text = json.dumps(told, indent=1)
        write_whole(Path(file), lambda path: path.write_text(text, "utf-8"))
