"""What the parts of `translution bench-gpu` are made of: rows that can be planned, skipped, kept.

A part is a function from `dry` to its rows. A row knows what it measures, how soon it is wanted and
how long it may take; it is measured by itself, so that one that fails stops no other.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ... import backends
from ...utils.measuring import copy_rate, matmul_rate
from .common import header
from .measure import Rates

__all__ = [
    "PROGRAM",
    "DeviceLost",
    "Record",
    "Row",
    "Setting",
    "begin",
    "dtype_name",
    "in_a_line",
    "in_order",
    "measured",
    "same",
]

PROGRAM = "translution bench-gpu"
Record = dict[str, Any]
"""What is known of a row, or of a run: what a file of JSON holds."""


class DeviceLost(Exception):
    """The device answers nothing more; only a new process can go on."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    part: what it belongs to. name: what it is called in its part; with the part it tells rows
    apart. measure: gives its numbers. rank: rows of rank 0 come first, of every part, then those of
    rank 1. needs: seconds that it may take on a GPU.
    """

    part: str
    name: str
    measure: Callable[[Setting], Record]
    rank: int = 0
    needs: float = 5.0


@dataclass
class Setting:
    """Where, how long and how often is measured.

    deadline: when the budget ends, by time.monotonic. backend: what the operators are asked for.
    patience: a comparison of more seconds is made once. rows: those of the file so far, for ratios.
    """

    device: torch.device
    deadline: float
    dry: bool = False
    repeats: int = 5
    backend: str = "auto"
    patience: float = 0.5
    rows: list[Record] = field(default_factory=list)

    @staticmethod
    def of_dry(deadline: float) -> Setting:
        """Tiny sizes on the CPU, through Triton's interpreter where that is switched on."""
        cpu = torch.device("cpu")
        able = backends.explain(cpu, torch.float32)["triton"] is None
        return Setting(cpu, deadline, True, 1, "triton" if able else "auto", patience=0.0)

    def left(self) -> float:
        """Seconds of the budget."""
        return self.deadline - time.monotonic()

    def fits(self, row: Row) -> bool:
        return self.left() > (0.0 if self.dry else row.needs)

    def rates(self, part: str, dtype: torch.dtype) -> Rates:
        """Of the device, measured once for each part and dtype."""
        return _rates(part, self.device, dtype, self.dry)

    def find(self, part: str, **wanted: Any) -> Record | None:
        """A finished row with these values."""
        for row in self.rows:
            same = all(row.get(name) == value for name, value in wanted.items())
            if row["part"] == part and "error" not in row and same:
                return row
        return None


@functools.lru_cache
def _rates(part: str, device: torch.device, dtype: torch.dtype, dry: bool) -> Rates:
    if dry:
        return Rates(matmul_rate(dtype, device, 64), copy_rate(device, 1 << 16))
    return Rates(matmul_rate(dtype, device), copy_rate(device))


def in_order(parts: Sequence[Sequence[Row]]) -> list[Row]:
    """By rank, and within a rank by part: what matters most of every part comes first."""
    return sorted((row for part in parts for row in part), key=lambda row: row.rank)


def measured(row: Row, setting: Setting) -> Record:
    """The row as it is kept; "error", in a line, in the place of its numbers where it failed.

    Raises:
        DeviceLost: the device does not even answer that it is done.
    """
    start = time.monotonic()
    try:
        found = row.measure(setting)
    except Exception as error:
        found = {"error": in_a_line(error)}
    lost = None
    if setting.device.type == "cuda":
        gc.collect()
        try:
            torch.cuda.synchronize(setting.device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            lost = DeviceLost(in_a_line(error))
    record = {**found, "part": row.part, "name": row.name, "took": time.monotonic() - start}
    setting.rows[:] = [one for one in setting.rows if not _is(one, row)] + [record]
    if lost:
        raise lost
    return record


def in_a_line(error: BaseException) -> str:
    """An exception, short."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:240]


def _is(record: Record, row: Row) -> bool:
    return bool(record["part"] == row.part and record["name"] == row.name)


def begin(setting: Setting, budget: float) -> Record:
    """What a file begins with. The machine's "source" tells versions of this library apart, also
    where there is no checkout."""
    record = header(setting.device)
    about = record["machine"]
    about["source"] = _source()
    try:
        about["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        about["triton"] = None
    started = {"program": PROGRAM, "dry": setting.dry, "budget": budget, **record}
    started["rows"] = setting.rows
    return started


def same(record: Record, earlier: Record) -> bool:
    """Whether an earlier file is of this library, on this device."""
    names = ["source", "device", "gpu", "torch", "triton"]
    if "gpu" not in record["machine"]:
        names.append("cpu")
    alike = all(record["machine"].get(name) == earlier["machine"].get(name) for name in names)
    return alike and record["dry"] == earlier.get("dry", False)


@functools.cache
def _source() -> str:
    """Twelve digits of the library's own files."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
