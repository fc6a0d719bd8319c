"""Progress of training and evaluation: a bar on a terminal, or a line per validation elsewhere.

The bar is our own and not Lightning's RichProgressBar. That one counts batches of one endless epoch
instead of steps, writes "Epoch 0/0" and breaks its metrics over lines of 80 columns.
"""

from __future__ import annotations

import sys
from typing import Any

from lightning import Callback, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["ProgressBar", "ProgressLines", "progress"]

# How metrics are written. MFU is the share of this machine's matrix-product speed that the model's
# operations reach ("model flops utilization").
FORMATS = {
    "train_loss": "loss {:.3f}",
    "train_accuracy": "accuracy {:.3f}",
    "train_perplexity": "perplexity {:.1f}",
    "valid_loss": "valid loss {:.3f}",
    "valid_accuracy": "valid accuracy {:.3f}",
    "valid_perplexity": "valid perplexity {:.1f}",
    "test_loss": "test loss {:.3f}",
    "images_per_second": "{:,.0f} images/s",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.0%}",
    "memory_gb": "{:.1f} GB",
}
# What the bar shows, the most important first, and what stays on screen after a validation.
AT_BAR = "train_loss", "images_per_second", "tokens_per_second", "mfu", "memory_gb"
AFTER_VALIDATION = "train_loss", "valid_loss", "valid_accuracy", "valid_perplexity"


def progress() -> Callback:
    """A bar if standard output is a terminal, and lines otherwise."""
    return ProgressBar() if sys.stdout.isatty() else ProgressLines()


def _formatted(values: dict[str, Any], names: Any = FORMATS) -> list[str]:
    return [FORMATS[name].format(values[name]) for name in names if name in values]


def _at_step(trainer: Trainer, task: Any, names: Any = FORMATS) -> str:
    step = trainer.global_step
    values = ", ".join(_formatted(trainer.progress_bar_metrics, names))
    return f"step {step} of {task.steps} (epoch {task.data.epoch_of(step):.3g}): {values}"


class ProgressLines(Callback):
    """Prints a line of metrics after each validation of a training run."""

    def on_validation_end(self, trainer: Trainer, task: Any) -> None:
        if trainer.is_global_zero and trainer.state.fn == "fit":
            print(_at_step(trainer, task), flush=True)


class ProgressBar(Callback):
    """Draws a bar of steps, with the time left and as many metrics as fit in one line. Each
    validation leaves a line above it."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.bar: Progress | None = None
        self.rows: dict[str, Any] = {}

    def _show(self, trainer: Trainer, row: str, total: float, done: int = 0) -> None:
        if not trainer.is_global_zero:
            return
        if self.bar is None:
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(10),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeRemainingColumn(),
                TextColumn("left{task.fields[metrics]}"), console=self.console,
            )  # fmt: skip
            self.bar.start()
        self.rows[row] = self.bar.add_task(row, total=total, completed=done, metrics="")

    def _hide(self, row: str) -> None:
        if self.bar is not None and row in self.rows:
            self.bar.remove_task(self.rows.pop(row))

    def _advance(self, row: str) -> None:
        if self.bar is not None:
            self.bar.advance(self.rows[row])

    def _stop(self, *_: Any, **__: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    on_exception = teardown = _stop

    def on_train_start(self, trainer: Trainer, task: Any) -> None:
        self._show(trainer, "train", task.steps, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, task: Any, *_: Any) -> None:
        if self.bar is None:
            return
        row = self.rows["train"]
        words = _formatted(trainer.progress_bar_metrics, AT_BAR)
        if speed := next(t.speed for t in self.bar.tasks if t.id == row):
            words.insert(1, f"{speed:.3g} steps/s")
        # what remains beside the name, the bar, the steps, the time with its label, and spaces
        room = self.console.width - 5 - 10 - 2 * len(str(task.steps)) - 1 - 12 - 4
        metrics = ""
        for word in words:
            if len(metrics) + 2 + len(word) > room:
                break
            metrics += f", {word}"
        self.bar.update(row, completed=trainer.global_step, metrics=metrics)

    def on_validation_start(self, trainer: Trainer, task: Any) -> None:
        self._show(trainer, "valid", _total(trainer.num_val_batches))

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self._advance("valid")

    def on_validation_end(self, trainer: Trainer, task: Any) -> None:
        if trainer.state.fn == "fit":
            self._hide("valid")
            if self.bar is not None:
                self.console.print(_at_step(trainer, task, AFTER_VALIDATION))

    def on_test_start(self, trainer: Trainer, task: Any) -> None:
        self._show(trainer, "test", _total(trainer.num_test_batches))

    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        self._advance("test")


def _total(batches: Any) -> float:
    return sum(batches) if isinstance(batches, list) else batches
