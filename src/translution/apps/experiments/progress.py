"""The progress of an experiment on the terminal: a bar for each run and one for all runs."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from .config import MEASURES, Run
from .runs import Runs

__all__ = ["RunsProgress"]


class RunsProgress:
    """Shows bars on a terminal, and prints a line for each finished run, also into a file.

    `Runs.make` calls `watch` and `tell`. Use it as a context manager.

    Args:
        runs: the runs of the experiment.
    """

    def __init__(self, runs: Runs):
        self.runs = runs
        # while a run trains in this process, sys.stdout is its log
        self.console = Console(file=sys.stdout, highlight=False)
        name = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        self.bars = Progress(
            TextColumn("{task.description}", table_column=name), BarColumn(12),
            TextColumn("{task.fields[numbers]}"), TimeElapsedColumn(), TimeRemainingColumn(),
            console=self.console, expand=True, disable=not self.console.is_terminal,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        planned = runs.planned()
        self.names = {run.folder: runs.name(run) for run in planned}
        self.finished = sum(runs.result(run) is not None for run in planned)
        self.going: dict[str, tuple[Any, float]] = {}
        self.whole = self.bars.add_task(self._count(len(planned)), total=len(planned), numbers="")

    def __enter__(self) -> RunsProgress:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        for task, _ in self.going.values():
            self.bars.remove_task(task)
        self.bars.stop()

    def watch(self, name: str, step: int, steps: int, metrics: dict[str, float]) -> None:
        """Update the bar of a run.

        Args:
            name: the folder of the run.
            step: the number of finished steps.
            steps: the number of all steps.
            metrics: the metrics that were logged last.
        """
        if name not in self.going:
            title = self.names.get(name, name)
            self.going[name] = self.bars.add_task(title, total=steps, numbers=""), 0.0
        task, _ = self.going[name]
        numbers = [f"loss {metrics['train_loss']:.3f}"] if "train_loss" in metrics else []
        if "train_accuracy" in metrics:
            numbers.append(f"{100 * metrics['train_accuracy']:.0f} %")
        self.bars.update(task, completed=step, total=steps, numbers=", ".join(numbers))
        self.going[name] = task, step / steps
        done = self.finished + sum(part for _, part in self.going.values())
        self.bars.update(self.whole, completed=done)

    def tell(self, run: Run, result: dict[str, Any], left: int) -> None:
        """Print a line for a finished run.

        Args:
            run: the run.
            result: its result.
            left: the number of runs that are not finished.
        """
        if run.folder in self.going:
            self.bars.remove_task(self.going.pop(run.folder)[0])
        self.finished += 1
        total = self.finished + left
        self.names |= {run.folder: self.runs.name(run) for run in self.runs.planned()}
        self.bars.update(self.whole, total=total, description=self._count(total))
        # rich wraps lines between words on a terminal; in a file each run has one line
        self.console.print(
            f"{self.names[run.folder]}: {self._tests(result)}  ({result['seconds']:.1f} s)",
            soft_wrap=not self.console.is_terminal,
        )

    def _count(self, total: int) -> str:
        return f"{self.finished} of {total} runs"

    def _tests(self, result: dict[str, Any]) -> str:
        """Describe the first measure of each test."""
        measure = MEASURES[self.runs.experiment.measures[0]]
        words = [
            f"on {test} {said}" if test else said
            for test, metrics in result["tests"].items()
            for said in [measure.words(measure.of(metrics, "test"))]
        ]
        return ", ".join(words) or "diverged"
