"""Logs of a run: metrics.csv, which a resumed run continues, and TensorBoard.

`MetricsFile` is our own and not Lightning's CSVLogger. That one deletes an earlier file, sorts its
columns by the alphabet and keeps its writer in private classes.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from ...utils.files import write_whole
from .devices import is_main_process

__all__ = ["GroupedTensorBoard", "MetricsFile", "read_curves"]

FILE = "metrics.csv"
# The order of columns: by the beginning of their names, then by the rest.
BEGINNINGS = ("step", "epoch", "seconds", "learning_rate", "train_", "valid_", "test_")
ENDS = ("loss", "accuracy", "accuracy_top5", "perplexity", "bits_per_byte", "skipped")


class MetricsFile(Logger):
    """Writes metrics.csv in a run's folder: a row per measurement, numbers with seven digits.

    Args:
        folder: the run's folder.
        step: where the run begins or continues. Later rows, of an earlier process, are removed,
            because their steps are computed again.
    """

    def __init__(self, folder: Path, step: int):
        super().__init__()
        self.folder, self.path = folder, folder / FILE
        self.columns: list[str] = []
        if is_main_process() and self.path.exists():
            self._rewrite([row for row in self._read() if _is_before(row, step)])

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing: config.yaml has the configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row."""
        row = {"step": str(step)} | {name: f"{value:.7g}" for name, value in metrics.items()}
        if new := [name for name in row if name not in self.columns]:
            rows = self._read() if self.path.exists() else []
            self.columns += new
            self._rewrite(rows)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def _read(self) -> list[dict[str, str]]:
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            self.columns = list(reader.fieldnames or [])
            return list(reader)

    def _rewrite(self, rows: Sequence[dict[str, str]]) -> None:
        self.columns = sorted(dict.fromkeys(self.columns), key=_column_order)

        def save(to: Path) -> None:
            with to.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(rows)

        write_whole(self.path, save)


def _column_order(name: str) -> tuple[int, int, str]:
    group = next((i for i, begin in enumerate(BEGINNINGS) if name.startswith(begin)), 99)
    end = name.partition("_")[2]
    return group, ENDS.index(end) if end in ENDS else 99, name


def _is_before(row: dict[str, str], step: int) -> bool:
    try:
        return int(row["step"]) <= step
    except (KeyError, TypeError, ValueError):  # a line that was cut off
        return False


def read_curves(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv; each has the metrics that were measured at its step."""
    with (folder / FILE).open(newline="") as file:
        return [
            {name: float(value) for name, value in row.items() if name and value}
            for row in csv.DictReader(file)
        ]


class GroupedTensorBoard(TensorBoardLogger):
    """TensorBoard with names in groups: train/loss, valid/loss, speed/images_per_second."""

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        super().log_metrics({_grouped(name): value for name, value in metrics.items()}, step)


def _grouped(name: str) -> str:
    group, _, rest = name.partition("_")
    if group in ("train", "valid", "test"):
        return f"{group}/{rest}"
    return f"train/{name}" if name in ("learning_rate", "epoch") else f"speed/{name}"
