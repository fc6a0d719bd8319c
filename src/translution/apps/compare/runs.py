"""All runs of a comparison, one after the other, with live progress."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

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

from ..data.digits import Digits, load_digits, mnist, train_batches
from .measure import peak_of_a_step
from .options import REGIMES, Options
from .report import write_report
from .results import MEASURES, Results, open_folder, save_checkpoint
from .training import accuracies, accuracy_by_distance, train_one

__all__ = ["run_all"]


def run_all(out: str, options: Options, command: str = "") -> bool:
    """Train, test and report into a folder; False if Ctrl-C ended it early.

    Raises:
        ValueError: naming the option, what came and what is wanted.
        OSError: data that cannot be read, or a folder that cannot be written.
    """
    began = time.perf_counter()
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
            _runs(options, data, results, console, began)
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


def _runs(options: Options, data: Digits, results: Results, console: Console, began: float) -> None:
    # by seed first, so that what Ctrl-C leaves is a fair comparison as far as it goes
    plan = [
        (options.seed + i, regime, mixer)
        for i in range(options.seeds)
        for regime in REGIMES
        for mixer in options.mixers
    ]
    steps = options.steps or 0
    peaks: dict[str, int] = {}
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with progress:
        whole = progress.add_task("all runs", total=len(plan) * steps, numbers="")
        for number, (seed, regime, mixer) in enumerate(plan):
            name = f"{mixer}, {regime}, seed {seed}"
            task = progress.add_task(name, total=steps, numbers="")

            def tell(
                step: int, loss: float, accuracy: float, task: Any = task, number: int = number
            ) -> None:
                numbers = f"loss {loss:.3f} accuracy {accuracy:.3f}"
                progress.update(task, completed=step, numbers=numbers)
                progress.update(whole, completed=number * steps + step)

            trained = train_one(options, data, mixer, regime, seed, tell)
            if trained.peak_bytes is None and mixer not in peaks:
                peaks[mixer] = _peak(options, data, mixer)
            by_distance = accuracy_by_distance(trained.model, data, options.canvas or 0)
            checkpoint = f"{mixer}-{regime}-seed{seed}.safetensors"
            config = options.model_config(mixer)
            save_checkpoint(results.folder / checkpoint, trained.model, config)  # type: ignore[arg-type]
            run: dict[str, Any] = {
                "mixer": mixer,
                "regime": regime,
                "seed": seed,
                "accuracy": accuracies(by_distance),
                "by_distance": by_distance,
                "curve": trained.curve,
                "seconds": round(trained.seconds, 3),
                "parameters": sum(p.numel() for p in trained.model.parameters()),
                "peak_bytes": peaks[mixer] if trained.peak_bytes is None else trained.peak_bytes,
                "checkpoint": checkpoint,
            }
            results.add(run, time.perf_counter() - began)
            progress.remove_task(task)
            told = "  ".join(f"on {test} {value:.3f}" for test, value in run["accuracy"].items())
            progress.console.print(f"{name}: {told}  ({trained.seconds:.1f} s)", highlight=False)


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
