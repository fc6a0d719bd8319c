"""Carry out the runs of an experiment: a single one, and several at the same time."""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback

from ...utils.files import write_whole
from ..training.checkpoints import STATE, latest
from ..training.devices import Diverged, pick_device, terminate
from ..training.run import evaluate, train
from .config import Experiment, Run
from .costs import data_of, parameters_of, parts_of

__all__ = ["RESULT", "Keep", "Maker", "Measuring", "Watch", "jobs_on", "working"]

RESULT = "result.json"
Keep = Literal["nothing", "weights", "everything"]
Measuring = Callable[[Path, Run], dict[str, Any]]
Watch = Callable[[str, int, int, dict[str, float]], None]
"""Takes the folder of a run, its step, its last step, and the metrics that were logged last."""


@dataclass(frozen=True)
class Maker:
    """Trains and tests the runs of an experiment.

    Attributes:
        experiment: the experiment.
        folder: the folder of all runs.
        source: the commit and the machine, which are stored with each result.
        keep: what is kept of the checkpoints of a finished run.
        measuring: takes the checkpoint of a finished run and returns further numbers. It is sent to
            other processes, so it must be a function of a module.
        tensorboard: whether runs write logs for TensorBoard.
    """

    experiment: Experiment
    folder: Path
    source: dict[str, Any]
    keep: Keep = "nothing"
    measuring: Measuring | None = None
    tensorboard: bool = False

    def __call__(self, run: Run) -> dict[str, Any]:
        """Train and test a run, write result.json, and return its content.

        A run that was interrupted earlier continues from its checkpoint.
        """
        folder, config = self.folder / run.folder, run.config
        checkpoints = folder / "run" / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        result: dict[str, Any] = {
            "row": run.arm.row, "regime": run.arm.regime, "budget": run.arm.budget,
            "rate": run.rate, "seed": run.seed, "identity": run.identity,
        }  # fmt: skip
        tests: dict[str, Any] = {}
        with (
            open(folder / "log.txt", "a", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            try:
                valid: dict[str, float] | None = train(
                    config, folder / "run", resume=True, parts=parts_of(config),
                    callbacks=[_Reporting(run.folder)], tensorboard=self.tensorboard,
                )  # fmt: skip
                at = latest(checkpoints)
                assert at is not None
                for test in self.experiment.tests:
                    tested = self.experiment.tested(run.arm, run.seed, test)
                    tests[test] = evaluate(at, "test", tested, parts_of(tested))
                if self.measuring is not None:
                    result |= self.measuring(at, run)
            except Diverged:
                valid, tests = None, {}  # this rate is too high: a result like any other
        result |= {
            "steps": data_of(config).steps,
            "dim": config.model.given.get("dim"),
            "parameters": parameters_of(config),
            "valid": valid,
            "tests": tests,
            "seconds": round(time.perf_counter() - began, 1),
            "date": date.today().isoformat(),
            **self.source,
        }
        text = json.dumps(result, indent=1)
        write_whole(folder / RESULT, lambda to: to.write_text(text, "utf-8"))
        if self.keep == "nothing":
            shutil.rmtree(checkpoints, ignore_errors=True)
        elif self.keep == "weights":
            for last in checkpoints.glob("last-*"):
                shutil.rmtree(last)
            for state in checkpoints.glob(f"best-*/{STATE}"):
                state.unlink()
        gc.collect()  # a trainer and its data refer to each other and hold much memory
        return result


class _Reporting(Callback):
    """Reports the progress of a run to the waiting process, at most ten times per second."""

    def __init__(self, name: str):
        self.name = name
        self.last = 0.0

    def on_train_batch_end(self, trainer: Any, task: Any, *_: Any) -> None:
        moment, step = time.perf_counter(), trainer.global_step
        if moment - self.last > 0.1 or step == task.steps:
            self.last = moment
            metrics = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
            _watch(self.name, step, task.steps, metrics)


# -- processes -------------------------------------------------------------------------------------


def _nobody(*_: Any) -> None:
    pass


_watch: Watch = _nobody  # of this process


def jobs_on(device: str, jobs: int) -> int:
    """Return how many runs are carried out at the same time.

    Args:
        device: the device, as the configuration names it.
        jobs: the number of runs; 0 takes one per core on a CPU, and one on other devices.

    Raises:
        ValueError: there is no such device, or jobs is negative.
    """
    if jobs < 0:
        raise ValueError(f"jobs: got {jobs}, want at least 0")
    return jobs or (os.cpu_count() or 1 if pick_device(device) == "cpu" else 1)


class _Here(Executor):
    """An executor that calls functions immediately, in this process."""

    def submit(self, function: Any, /, *arguments: Any, **keywords: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*arguments, **keywords))
        return done


@contextlib.contextmanager
def working(
    jobs: int, watch: Watch, threads: int | None
) -> Iterator[tuple[Executor, Callable[[], None]]]:
    """Yield an executor for runs, and a function that passes on the reports of their progress.

    One job runs in this process. Several jobs run in processes that carry out many runs each, with
    one thread each: small models do not use two threads well, and two processes take little more
    than half of the time of one. An error or Ctrl-C ends the processes, and the checkpoints of
    their runs are kept.

    Args:
        jobs: the number of runs at the same time.
        watch: takes the reports of progress.
        threads: the threads of runs in this process; None leaves torch's default.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    usual = torch.get_num_threads()
    try:
        if jobs == 1:
            _begin(watch, threads)
            yield _Here(), _nobody
            return
        context = _context()
        messages = context.SimpleQueue()

        def pass_on() -> None:
            while not messages.empty():
                watch(*messages.get())

        with ProcessPoolExecutor(
            jobs, mp_context=context, initializer=_begin_process, initargs=(messages,)
        ) as pool:
            try:
                yield pool, pass_on
            except BaseException:
                terminate(pool)
                raise
    finally:
        _begin(_nobody, usual)
        if main:
            signal.signal(signal.SIGTERM, before)


def _context() -> Any:
    """Return the way in which processes are started.

    On Linux they are forked from a server that has imported the library and done nothing else, so
    that it is imported once instead of once per process. Forking this process itself would be
    unsafe, since it may have threads or have used a GPU. For the same reason, nothing that is
    imported here may ask torch.cuda for devices: CUDA would then fail in the forked processes.
    """
    if not sys.platform.startswith("linux"):
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _begin(watch: Watch, threads: int | None) -> None:
    global _watch
    _watch = watch
    if threads is not None:
        torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """End this process when the waiting process has ended, however that happened."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _begin_process(messages: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the waiting process handles Ctrl-C
    # imported objects stay; garbage collection among them would take a third of a second per run
    gc.freeze()
    atexit.register(gc.unfreeze)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _begin(lambda *message: messages.put(message), 1)
