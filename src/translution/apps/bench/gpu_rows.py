"""The rows of `translution bench-gpu`, which can be planned, skipped and stored.

Each part of the command is a function that takes `dry` and returns rows. A row has a function that
measures it, a rank and a time limit. Rows are measured independently: if one fails, the others
still run.
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
"""The fields of a measured row, or of a whole run, as the JSON file stores them."""


class DeviceLost(Exception):
    """The device no longer responds; only a new process can continue."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        part: the part to which the row belongs.
        name: the name of the row, unique within its part.
        measure: takes the setting and returns the numbers of the row.
        rank: rows of rank 0 of all parts come first, then those of rank 1, and so on.
        needs: the seconds that the row may take on a GPU.
    """

    part: str
    name: str
    measure: Callable[[Setting], Record]
    rank: int = 0
    needs: float = 5.0


@dataclass
class Setting:
    """The device, the time limit and the repeats of a run.

    Attributes:
        device: the device to measure.
        deadline: the end of the budget, in the seconds of time.monotonic.
        dry: whether the run uses tiny sizes.
        repeats: the number of timed calls.
        backend: the backend of the operators.
        patience: a comparison that takes longer than this many seconds is timed only once.
        rows: the rows of the file so far; ratios are computed with them.
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
        """Return the setting of a dry run: the CPU, with Triton's interpreter if it is enabled."""
        cpu = torch.device("cpu")
        able = backends.explain(cpu, torch.float32)["triton"] is None
        return Setting(cpu, deadline, True, 1, "triton" if able else "auto", patience=0.0)

    def left(self) -> float:
        """Return the seconds that are left of the budget."""
        return self.deadline - time.monotonic()

    def fits(self, row: Row) -> bool:
        """Return whether the budget has enough time left for a row."""
        return self.left() > (0.0 if self.dry else row.needs)

    def rates(self, part: str, dtype: torch.dtype) -> Rates:
        """Return the rates of the device, which are measured once for each part and dtype."""
        return _rates(part, self.device, dtype, self.dry)

    def find(self, part: str, **wanted: Any) -> Record | None:
        """Return a finished row of a part whose fields have these values, or None."""
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
    """Sort rows by rank, and within a rank by part, so that the most important rows come first."""
    return sorted((row for part in parts for row in part), key=lambda row: row.rank)


def measured(row: Row, setting: Setting) -> Record:
    """Measure a row, and add it to the rows of the setting.

    Args:
        row: the row to measure.
        setting: the device and the time limit.

    Returns:
        The numbers of the row with its "part", its "name" and the seconds that it took ("took").
        A row that failed has "error" in place of the numbers.

    Raises:
        DeviceLost: the device no longer responds.
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
    """Describe an exception in one short line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:240]


def _is(record: Record, row: Row) -> bool:
    return bool(record["part"] == row.part and record["name"] == row.name)


def begin(setting: Setting, budget: float) -> Record:
    """Begin the record of a run.

    The machine's "source" is a hash of the library's source files. It distinguishes versions of the
    library also without a git checkout.

    Args:
        setting: the setting of the run, whose rows the record contains.
        budget: the seconds of the whole run.
    """
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
    """Return whether an earlier record comes from this version of the library on this device."""
    names = ["source", "device", "gpu", "torch", "triton"]
    if "gpu" not in record["machine"]:
        names.append("cpu")
    alike = all(record["machine"].get(name) == earlier["machine"].get(name) for name in names)
    return alike and record["dry"] == earlier.get("dry", False)


@functools.cache
def _source() -> str:
    """Return the first twelve digits of a hash of the library's source files."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
