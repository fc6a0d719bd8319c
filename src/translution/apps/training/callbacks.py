"""What happens beside the steps: measuring, logging, saving."""

from __future__ import annotations

import csv
import math
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from ...utils.files import write_whole
from ...utils.measuring import known_matmul_rate
from .checkpoints import Folders
from .config import TrainOptions
from .data import Part
from .tasks import Task

__all__ = ["Curves", "Keeper", "Meter", "read_curves"]


class Meter(Callback):
    """Reads the training meters every `log_every` steps, and those of each validation; adds speed,
    memory and the share of the matmul rate, and hands them to the loggers and the progress bar."""

    def __init__(self, options: TrainOptions, flops: float):
        self.options = options
        self.flops = flops  # of a training step, per unit
        self.rate = 0.0  # of matrix products, flops per second
        self.began, self.units = 0.0, 0
        self.measured: dict[str, float] = {}  # by the last validation or test

    def on_train_start(self, trainer: Trainer, task: Task) -> None:  # type: ignore[override]
        self.rate = known_matmul_rate(getattr(torch, self.options.precision), task.device)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, task: Task, outputs: Any, batch: Any, index: int
    ) -> None:
        if self.began:
            self.units += task.size(batch)
        else:  # the first batch has the warm-up in it
            self.began = time.perf_counter()
        step = trainer.global_step
        if (index + 1) % self.options.accumulate or not (
            step % self.options.log_every == 0 or step == task.steps
        ):
            return
        values = {
            f"train_{name}": value
            for name, value in task.read(task.training_meters, "train").items()
        }
        if not math.isfinite(values["train_loss"]):
            raise ValueError(
                f"loss: is {values['train_loss']} at step {step}; want a smaller "
                "train.learning_rate, or train.clip (the earlier checkpoints are whole)"
            )
        values["learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        seconds = time.perf_counter() - self.began
        if self.units and seconds > 0:
            ranks = trainer.world_size // self.options.offset_ranks
            speed = self.units * ranks / seconds
            values[f"{task.unit}_per_second"] = speed
            values["mfu"] = self.flops * self.units / seconds / self.rate
        values["memory_gb"] = _memory(task.device) / 1e9
        self.began, self.units = time.perf_counter(), 0
        _tell(trainer, task, values)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        task: Task = pl_module
        part: Part = "test" if trainer.testing else "valid"
        values = task.read(task.validation_meters, part)
        self.began, self.units = time.perf_counter(), 0
        self.measured = {f"{part}_{name}": value for name, value in values.items()}
        _tell(trainer, task, self.measured)

    on_test_epoch_end = on_validation_epoch_end


def _tell(trainer: Trainer, task: Task, values: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(values, trainer.global_step)
        logger.save()
    hidden = ("learning_rate", "skipped")
    shown = {name: value for name, value in values.items() if not name.endswith(hidden)}
    task.log_dict(shown, prog_bar=True, logger=False, batch_size=1)


def _memory(device: torch.device) -> int:
    """Peak bytes: of the device, or on the CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Keeper(Checkpoint):
    """Keeps the last and the best checkpoint: saves the new one, then removes the one before.

    The last is saved every `save_every` steps, at the end, and before a SIGTERM or, in one process,
    a Ctrl-C is followed; the best where a validation had the least loss. What is saved at a step
    with a validation is saved after it. At the last step a validation always follows.
    """

    def __init__(self, folder: Path, io: Folders, meter: Meter, steps: int):
        self.folder, self.io, self.meter, self.steps = folder, io, meter, steps
        self.options = meter.options
        self.least = math.inf
        self.interrupted = False
        self.saved: dict[str, int] = {}  # the step of each kind

    def on_train_start(self, trainer: Trainer, task: Any) -> None:
        # where several processes get Ctrl-C, each may be at another step: they can't save together
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._interrupt)  # `interruptible` puts the old one back

    def _interrupt(self, *_: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print("\nCtrl-C: saves after this step; again: stops at once", file=sys.stderr, flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"least": self.least}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.least = state_dict["least"]

    def on_train_batch_end(
        self, trainer: Trainer, task: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        step = trainer.global_step
        if (index + 1) % self.options.accumulate:
            return
        if step == self.steps:
            trainer.should_stop = True  # Lightning then validates
        elif step % self.options.validate_every and self._due(trainer):
            self._save(trainer, "last")
            self._follow(step)

    def on_validation_end(self, trainer: Trainer, task: Any) -> None:
        if trainer.state.fn != "fit":
            return
        self.io.metrics = self.meter.measured
        # the best first: a run that is killed between the two goes on from there
        if self.io.metrics["valid_loss"] < self.least:
            self.least = self.io.metrics["valid_loss"]
            self._save(trainer, "best")
        if self._due(trainer):
            self._save(trainer, "last")
            self._follow(trainer.global_step)

    def _due(self, trainer: Trainer) -> bool:
        step, asked = trainer.global_step, trainer.received_sigterm or self.interrupted
        return asked or step % self.options.save_every == 0 or step == self.steps

    def _follow(self, step: int) -> None:
        """Ctrl-C, now that all is saved."""
        if self.interrupted and step < self.steps:
            raise KeyboardInterrupt

    def _save(self, trainer: Trainer, kind: str) -> None:
        step = trainer.global_step
        if self.saved.get(kind) == step:  # not by a look at the files: ranks must agree on it
            return
        self.saved[kind] = step
        path = self.folder / f"{kind}-{step:06d}"
        before = [p for p in self.folder.glob(f"{kind}-*") if p != path]
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            for old in before:
                self.io.remove_checkpoint(old)


class Curves(CSVLogger):
    """metrics.csv in a run's folder, which a resumed run continues from its step."""

    def __init__(self, folder: Path, step: int):
        super().__init__(folder, name="", version="")
        if not rank_zero_only.rank:  # type: ignore[attr-defined]
            _keep_rows(folder / "metrics.csv", step)

    @property
    def log_dir(self) -> str:
        return str(self._root_dir)

    @property
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _Continued(self.log_dir)
        return self._experiment


class _Continued(_ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.exists():
            with path.open(newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])


def _keep_rows(path: Path, step: int) -> None:
    """Those up to a step: what came after is done again."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows, names = [row for row in reader if _upto(row, step)], reader.fieldnames or []

    def save(to: Path) -> None:
        with to.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)

    write_whole(path, save)


def _upto(row: dict[str, str], step: int) -> bool:
    try:
        return int(row["step"]) <= step
    except (KeyError, TypeError, ValueError):  # a line that a kill cut short
        return False


def read_curves(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv, each with what was measured at its step."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {name: float(value) for name, value in row.items() if name and value}
            for row in csv.DictReader(file)
        ]
