"""What a run says: what it is made of before it begins, numbers while it goes on, and what can be
done with it at the end."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..data.images import Images
from .config import Config
from .data import Data, Part
from .engine import pick_device

__all__ = ["Cost", "about_run", "leads", "next_commands", "progress"]


def leads() -> bool:
    """Whether this is the process that speaks and writes, of those that share a run."""
    return not rank_zero_only.rank  # type: ignore[attr-defined]


class Cost(NamedTuple):
    """Of a model: parameters, and multiply-adds per image or token."""

    parameters: int
    multiply_adds: float


def about_run(config: Config, data: Data, name: str, options: dict[str, Any], cost: Cost) -> str:
    """Data, model, machine and steps, a line each."""
    train = config.train
    images = isinstance(data.part("train"), Images)
    mixer = f", {options['mixer']}" if "mixer" in options else ""
    device = pick_device(train.device)
    if train.devices * train.nodes > 1:
        device = f"{train.devices * train.nodes} × {device}"
    elif device == "cpu":
        threads = torch.get_num_threads()
        device += f", {threads} thread{'s' * (threads > 1)}"
    each = "images" if images else f"texts of {data.facts['context']:,} tokens"
    steps = f"{data.steps:,} of {train.batch_size:,} {each}"
    told = {
        "data": f"{_sizes(data)}; {_kinds(data)}",
        "model": f"{name}{mixer}: {cost.parameters:,} parameters, "
        f"{_short(cost.multiply_adds)} multiply-adds per {'image' if images else 'token'}",
        "on": f"{device}; {train.precision}",
        "steps": f"{steps}; validation every {train.validate_every:,}",
    }
    return "\n".join(f"{key:6} {value}" for key, value in told.items())


def _sizes(data: Data) -> str:
    def size(part: Part) -> str:
        opened = data.part(part)
        if isinstance(opened, Images):
            return f"{len(opened):,} images"
        return f"{opened.tokens:,} tokens"

    return f"{size('train')} to train, {size('valid')} to validate"


def _kinds(data: Data) -> str:
    train = data.part("train")
    if not isinstance(train, Images):
        return f"a vocabulary of {train.vocab_size:,}"
    height, width = data.facts["image_size"]
    return f"{len(train.classes):,} classes; {height}×{width} pixels"


def _short(number: float) -> str:
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def next_commands(config: Config, folder: Path) -> str:
    """What to do with a run that has ended, a command a line."""
    run = shlex.quote(str(folder))
    images = config.data.kind == "images"
    use = "predict {} IMAGES" if images else 'generate {} --prompt "Once"'
    commands = ["evaluate {}", use, "share {} FOLDER"]
    return "\n".join(["Next:", *(f"  translution {c.format(run)}" for c in commands)])


# What one watches of the metrics, in few words.
SHOWN = {
    "train_loss": "loss {:.3f}",
    "train_accuracy": "accuracy {:.3f}",
    "train_perplexity": "perplexity {:.1f}",
    "valid_loss": "valid {:.3f}",
    "valid_accuracy": "accuracy {:.3f}",
    "valid_perplexity": "perplexity {:.1f}",
    "test_loss": "test {:.3f}",
    "images_per_second": "{:,.0f} images/s",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "{:.0%} of matmul",
    "memory_gb": "{:.1f} GB",
}


def progress() -> Callback:
    return Bar() if sys.stdout.isatty() else Lines()


def _in_words(values: dict[str, Any], names: Any = SHOWN) -> list[str]:
    return [SHOWN[name].format(values[name]) for name in names if name in values]


class Lines(Callback):
    """Where nobody watches a bar: a line at each validation."""

    def on_validation_end(self, trainer: Trainer, task: Any) -> None:
        if trainer.is_global_zero and trainer.state.fn == "fit":
            told = ", ".join(_in_words(trainer.progress_bar_metrics))
            print(f"step {trainer.global_step} of {task.steps}: {told}", flush=True)


# At a bar, the most wanted first, and in the line that a validation leaves.
WATCHED = "train_loss", "images_per_second", "tokens_per_second", "mfu", "memory_gb"
VALIDATED = "train_loss", "valid_loss", "valid_accuracy", "valid_perplexity"


class Bar(Callback):
    """A line of progress, in steps, with as many numbers as the terminal has room for. Each
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
                TextColumn("{task.fields[told]}"), console=self.console,
            )  # fmt: skip
            self.bar.start()
        self.rows[row] = self.bar.add_task(row, total=total, completed=done, told="")

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
        # beside the name, the bar, the time and the spaces between
        room = self.console.width - 5 - 10 - 7 - 5 - 2 * len(str(task.steps)) - 1
        told = ""
        for words in _in_words(trainer.progress_bar_metrics, WATCHED):
            if len(longer := f"{told}, {words}" if told else words) > room:
                break
            told = longer
        self.bar.update(self.rows["train"], completed=trainer.global_step, told=told)

    def on_validation_start(self, trainer: Trainer, task: Any) -> None:
        self._show(trainer, "valid", _count(trainer.num_val_batches))

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self._advance("valid")

    def on_validation_end(self, trainer: Trainer, task: Any) -> None:
        self._hide("valid")
        if self.bar is not None and trainer.state.fn == "fit":
            told = ", ".join(_in_words(trainer.progress_bar_metrics, VALIDATED))
            self.console.print(f"step {trainer.global_step} of {task.steps}: {told}")

    def on_test_start(self, trainer: Trainer, task: Any) -> None:
        self._show(trainer, "test", _count(trainer.num_test_batches))

    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        self._advance("test")


def _count(batches: Any) -> float:
    return sum(batches) if isinstance(batches, list) else batches
