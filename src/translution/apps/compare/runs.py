"""All runs of a comparison, with live progress."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ...models import ViT
from ..data.digits import Digits, load_digits, mnist, train_batches
from ..training.engine import pick_device, terminate
from .measure import peak_of_a_step
from .options import REGIMES, Options
from .report import write_report
from .results import MEASURES, Results, open_folder, save_checkpoint
from .training import accuracies, accuracy_by_distance, train_one

__all__ = ["run_all"]


Run = tuple[int, str, str]
"""The seed, the regime and the mixer of a run."""
Report = Callable[[int, float, float], None]
"""Takes the step, the loss and the accuracy of a run so far."""


def run_all(out: str, options: Options, command: str = "", jobs: int = 1) -> bool:
    """Train, test and report into a folder; False if Ctrl-C ended it early.

    Args:
        out: the folder.
        options: what is compared.
        command: the command that results.json names.
        jobs: how many runs train at the same time, each in a process of its own with one thread; 0
            is one for each core on the CPU, and one on other devices. With 1, everything runs in
            this process with all threads.

    Raises:
        ValueError: naming the option, what came and what is wanted.
        OSError: data that cannot be read, or a folder that cannot be written.
    """
    began = time.perf_counter()
    if jobs < 0:
        raise ValueError(f"jobs: got {jobs}, want at least 0")
    options = options.resolved()
    data = _data(options)
    folder = Path(out)
    open_folder(folder)
    about = {
        "name": options.data, "train": len(data.train), "test": len(data.test), "size": data.size
    }  # fmt: skip
    results = Results(folder, options, command, about)
    results.save()
    console = Console()
    interrupted = False
    with torch.random.fork_rng(devices=[]):
        try:
            _runs(options, data, results, console, began, jobs)
        except KeyboardInterrupt:
            interrupted = True
            console.print(f"Stopped; {len(results.runs)} of {results.planned} runs are finished.")
    results.seconds = time.perf_counter() - began
    results.save()
    write_report(folder, results.as_dict(), data)
    _print_table(console, results.as_dict())
    console.print(
        f"{folder / 'report.html'}  ({time.perf_counter() - began:.0f} s)", soft_wrap=True
    )
    return not interrupted


def _runs(
    options: Options, data: Digits, results: Results, console: Console, began: float, jobs: int
) -> None:
    # by seed first, so that what Ctrl-C leaves is a fair comparison as far as it goes
    plan = [
        (options.seed + i, regime, mixer)
        for i in range(options.seeds)
        for regime in REGIMES
        for mixer in options.mixers
    ]
    steps = options.steps or 0
    peaks: dict[str, int] = {}
    done = dict.fromkeys(plan, 0)
    tasks: dict[Run, Any] = {}
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )

    def report(run: Run, step: int, loss: float, accuracy: float) -> None:
        if run not in tasks:
            tasks[run] = progress.add_task(_name(run), total=steps, numbers="")
        numbers = f"loss {loss:.3f} accuracy {accuracy:.3f}"
        progress.update(tasks[run], completed=step, numbers=numbers)
        done[run] = step
        progress.update(whole, completed=sum(done.values()))

    def finish(run: Run, found: dict[str, Any]) -> None:
        mixer = run[2]
        if found["peak_bytes"] is None:
            if mixer not in peaks:
                peaks[mixer] = _peak(options, data, mixer)
            found["peak_bytes"] = peaks[mixer]
        results.add(found, time.perf_counter() - began)
        if run in tasks:
            progress.remove_task(tasks.pop(run))
        tested = "  ".join(f"on {test} {value:.3f}" for test, value in found["accuracy"].items())
        line = f"{_name(run)}: {tested}  ({found['seconds']:.1f} s)"
        progress.console.print(line, highlight=False)

    with progress:
        whole = progress.add_task("all runs", total=len(plan) * steps, numbers="")
        jobs = jobs or (os.cpu_count() or 1 if pick_device(options.device) == "cpu" else 1)
        if jobs == 1:
            for run in plan:
                found = train_and_test(
                    options, data, results.folder, run, functools.partial(report, run)
                )
                finish(run, found)
        else:
            in_processes(options, results.folder, plan, min(jobs, len(plan)), report, finish)


def train_and_test(
    options: Options, data: Digits, folder: Path, run: Run, report: Report
) -> dict[str, Any]:
    """Train and test one model, save it in the folder, and return what results.json holds of it.

    "peak_bytes" is None where the device does not count them.
    """
    seed, regime, mixer = run
    trained = train_one(options, data, mixer, regime, seed, report)
    by_distance = accuracy_by_distance(trained.model, data, options.canvas or 0)
    checkpoint = f"{mixer}-{regime}-seed{seed}.safetensors"
    save_checkpoint(folder / checkpoint, cast(ViT, trained.model), options.model_config(mixer))
    return {
        "mixer": mixer,
        "regime": regime,
        "seed": seed,
        "accuracy": accuracies(by_distance),
        "by_distance": by_distance,
        "curve": trained.curve,
        "seconds": round(trained.seconds, 3),
        "parameters": sum(p.numel() for p in trained.model.parameters()),
        "peak_bytes": trained.peak_bytes,
        "checkpoint": checkpoint,
    }


def in_processes(
    options: Options,
    folder: Path,
    plan: list[Run],
    jobs: int,
    report: Callable[[Run, int, float, float], None],
    finish: Callable[[Run, dict[str, Any]], None],
) -> None:
    """Train several models at the same time, each in a process of its own with one thread.

    Models as small as these do not keep two threads busy, so that two processes finish in little
    more than half of the time.
    """
    context = get_context("spawn")
    messages = context.SimpleQueue()
    arguments = options, messages
    with ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_begin, initargs=arguments
    ) as pool:
        try:
            going = {pool.submit(_in_a_process, folder, run): run for run in plan}
            while going:
                finished = wait(going, timeout=0.2, return_when=FIRST_COMPLETED).done
                while not messages.empty():
                    report(*messages.get())
                for job in sorted(finished, key=lambda job: plan.index(going[job])):
                    finish(going.pop(job), job.result())
        except BaseException:
            terminate(pool)
            raise


_process: dict[str, Any] = {}
"""What a process of `in_processes` keeps from run to run."""


def _begin(options: Options, messages: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    torch.set_num_threads(1)
    _process.update(options=options, messages=messages, data=_data(options))


def _in_a_process(folder: Path, run: Run) -> dict[str, Any]:
    def report(step: int, loss: float, accuracy: float) -> None:
        _process["messages"].put((run, step, loss, accuracy))

    return train_and_test(_process["options"], _process["data"], folder, run, report)


def _name(run: Run) -> str:
    seed, regime, mixer = run
    return f"{mixer}, {regime}, seed {seed}"


def _data(options: Options) -> Digits:
    data = load_digits() if options.data == "digits" else mnist(options.expanded_data_dir())
    return data.limited(options.train_limit, options.test_limit)


def _peak(options: Options, data: Digits, mixer: str) -> int:
    batch = next(train_batches(data, options.canvas or 0, True, options.batch_size or 1, 1, 0))
    return peak_of_a_step(options.model(mixer), *batch)


def _print_table(console: Console, results: dict[str, Any]) -> None:
    if not results["summary"]:
        return
    table = Table("", *MEASURES, "parameters", "seconds", "peak MiB")
    for column in table.columns[4:] + table.columns[:1]:
        column.no_wrap = True
    for row in results["summary"]:
        cells = [_percent(row[measure]) for measure in MEASURES]
        seconds = row["seconds"]["mean"]
        table.add_row(
            row["mixer"], *cells, f"{row['parameters']:,}", f"{seconds:.1f}",
            f"{row['peak_bytes'] / 2**20:.1f}",
        )  # fmt: skip
    console.print(table)


def _percent(value: dict[str, Any]) -> str:
    if value["mean"] is None:
        return "–"
    apart = "" if value["std"] is None else f" ± {100 * value['std']:.1f}"
    return f"{100 * value['mean']:.1f}{apart} %"
