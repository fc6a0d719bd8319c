"""What happens beside the training steps: measuring, and saving checkpoints.

`Meter` is our own and not Lightning's ThroughputMonitor. That one assumes that all batches have one
size, includes the first with its warm-up, and has MFU only for GPUs whose peak rate it lists.
"""

from __future__ import annotations

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
from lightning.pytorch.callbacks import Checkpoint

from ...utils.measuring import known_matmul_rate
from ..data.parts import Part
from .checkpoints import Folders
from .config import TrainOptions
from .devices import REMEDY, Diverged
from .logs import read_curves
from .tasks import Task

__all__ = ["Keeper", "Meter", "read_curves"]


class Meter(Callback):
    """Measures a run, and gives the metrics to the loggers and to the progress bar.

    Training metrics are means since the last ones, every `log_every` steps; with them come speed,
    memory and MFU. Validation metrics follow each validation.

    Args:
        options: those of the training.
        flops: floating-point operations of a training step, per image or token.

    Attributes:
        measured: the metrics of the last validation or test.
    """

    def __init__(self, options: TrainOptions, flops: float):
        self.options = options
        self.flops = flops
        self.matmul_rate = 0.0  # floating-point operations per second of a large matrix product
        self.began, self.units = 0.0, 0  # of the interval that is being measured
        self.trained, self.started = 0.0, 0.0  # seconds of earlier processes; the start of this one
        self.measured: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.trained = state_dict["seconds"]

    @property
    def seconds(self) -> float:
        """Seconds of training and validation, in all processes of the run."""
        return self.trained + (time.perf_counter() - self.started if self.started else 0.0)

    def on_train_start(self, trainer: Trainer, task: Task) -> None:  # type: ignore[override]
        self.matmul_rate = known_matmul_rate(getattr(torch, self.options.precision), task.device)
        self.started = time.perf_counter()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, task: Task, outputs: Any, batch: Any, index: int
    ) -> None:
        if self.began:
            self.units += task.size(batch)
        else:  # the first batch includes the warm-up of the device
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
        _check_loss(values["train_loss"], f"at step {step} or since the last log")
        values["learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        seconds = time.perf_counter() - self.began
        if self.units and seconds > 0:
            ranks = trainer.world_size // self.options.offset_ranks
            values[f"{task.unit}_per_second"] = self.units * ranks / seconds
            values["mfu"] = self.flops * self.units / seconds / self.matmul_rate
        values["memory_gb"] = _peak_bytes(task.device) / 1e9
        self.began, self.units = time.perf_counter(), 0
        self._log(trainer, task, values)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        task: Task = pl_module
        part: Part = "test" if trainer.testing else "valid"
        values = task.read(task.validation_meters, part)
        self.began, self.units = time.perf_counter(), 0
        _check_loss(values["loss"], f"on data.{part} at step {trainer.global_step}")
        self.measured = {f"{part}_{name}": value for name, value in values.items()}
        self._log(trainer, task, self.measured)

    on_test_epoch_end = on_validation_epoch_end

    def _log(self, trainer: Trainer, task: Task, values: dict[str, float]) -> None:
        step = trainer.global_step
        when = {"epoch": round(task.data.epoch_of(step), 4), "seconds": round(self.seconds, 1)}
        for logger in trainer.loggers:
            logger.log_metrics(when | values, step)
            logger.save()
        hidden = ("learning_rate", "skipped")
        shown = {name: value for name, value in values.items() if not name.endswith(hidden)}
        task.log_dict(shown, prog_bar=True, logger=False, batch_size=1)


def _check_loss(loss: float, where: str) -> None:
    """Stop the run, in all processes alike, if a loss in a mean was not finite."""
    if not math.isfinite(loss):
        raise Diverged(f"loss: is {loss} {where}; {REMEDY}")


def _peak_bytes(device: torch.device) -> int:
    """The peak memory in bytes: of the device, or of the process if it is a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Keeper(Checkpoint):
    """Keeps the last and the best checkpoint. It saves a new one before it removes the old one.

    The last checkpoint is saved every `save_every` steps, at the end, and before the run follows a
    SIGTERM or (in one process) a Ctrl-C. The best one is saved when a validation has the smallest
    loss so far. At a step with a validation the checkpoint is saved after it, and the last step
    always has a validation.

    Args:
        folder: the folder for checkpoints.
        io: writes them.
        meter: has the metrics that are saved with them.
        steps: the number of steps of the run.
    """

    def __init__(self, folder: Path, io: Folders, meter: Meter, steps: int):
        self.folder, self.io, self.meter, self.steps = folder, io, meter, steps
        self.options = meter.options
        self.least = math.inf  # the smallest validation loss
        self.interrupted = False
        self.saved: dict[str, int] = {}  # kind of checkpoint -> its step

    def on_train_start(self, trainer: Trainer, task: Any) -> None:
        # several processes may get Ctrl-C at different steps, and then cannot save together
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._interrupt)  # `interruptible` restores the old one

    def _interrupt(self, *_: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print(
            "\nCtrl-C: the run stops after this step and saves it; a second Ctrl-C stops at once",
            file=sys.stderr, flush=True,
        )  # fmt: skip

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
        elif step % self.options.validate_every and self._is_due(trainer):
            self._save(trainer, "last")
            self._stop_if_interrupted(step)

    def on_validation_end(self, trainer: Trainer, task: Any) -> None:
        if trainer.state.fn != "fit":
            return
        self.io.metrics = self.meter.measured
        # the best first: a run that is killed between the two continues from there
        if self.io.metrics["valid_loss"] < self.least:
            self.least = self.io.metrics["valid_loss"]
            self._save(trainer, "best")
        if self._is_due(trainer):
            self._save(trainer, "last")
            self._stop_if_interrupted(trainer.global_step)

    def _is_due(self, trainer: Trainer) -> bool:
        step, asked = trainer.global_step, trainer.received_sigterm or self.interrupted
        return asked or step % self.options.save_every == 0 or step == self.steps

    def _stop_if_interrupted(self, step: int) -> None:
        if self.interrupted and step < self.steps:
            raise KeyboardInterrupt

    def _save(self, trainer: Trainer, kind: str) -> None:
        step = trainer.global_step
        if self.saved.get(kind) == step:  # all ranks must agree, so this does not look at files
            return
        task: Any = trainer.lightning_module
        sums = task.training_meters["loss"].metric_state  # since the last log, in this process
        if not trainer.strategy.reduce_boolean_decision(bool(sums["mean_value"].isfinite())):
            raise Diverged(f"loss: is not finite at step {step} or since the last log; {REMEDY}")
        self.saved[kind] = step
        path = self.folder / f"{kind}-{step:06d}"
        before = [p for p in self.folder.glob(f"{kind}-*") if p != path]
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            for old in before:
                self.io.remove_checkpoint(old)
