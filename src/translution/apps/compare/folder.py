"""The folder of a comparison: results.json, report.html, and the runs with their checkpoints."""

from __future__ import annotations

import datetime
import json
import shutil
import time
from pathlib import Path
from typing import Any

from ...utils.files import write_whole
from ...utils.measuring import machine
from ...utils.tables import console_table
from ..experiments.config import Experiment, Run
from ..experiments.costs import data_of
from ..experiments.making import jobs_on
from ..experiments.progress import RunsProgress
from ..experiments.runs import Runs
from .distances import accuracy_by_distance, held_out
from .report import write_report

__all__ = ["compare_in"]

FORMAT = "translution-compare-2"
FORMATS = ("translution-compare-1", FORMAT)
RUNS = "runs"


def compare_in(out: str, experiment: Experiment, command: str = "", jobs: int = 1) -> bool:
    """Carry out a comparison, and write its results and its report into a folder.

    If the folder holds the same comparison unfinished, it is continued; any other comparison in it
    is replaced.

    Args:
        out: the folder.
        experiment: the experiment, as `comparison` returns it.
        command: the command, which results.json records.
        jobs: the number of runs that train at the same time, each in its own process with one
            thread; 0 takes one per core on a CPU, and one on other devices. With 1, everything runs
            in this process with all threads.

    Returns:
        Whether the comparison is complete; False if Ctrl-C ended it early.

    Raises:
        ValueError: an option has a wrong value, or the folder holds something else.
        OSError: the data cannot be read, or the folder cannot be written.
    """
    began = time.perf_counter()
    folder = Path(out)
    runs = Runs(experiment, folder / RUNS, list(experiment.rows), ["steps"])
    jobs = jobs_on(runs.device, jobs)
    planned = runs.planned()
    config = planned[0].config
    data_of(config).part(
        "train"
    )  # fails here if the data cannot be read, before anything is removed
    digits, labels = held_out(config)
    options = experiment.model_dump(mode="json")
    before = open_folder(folder, options)
    progress = RunsProgress(runs)
    content: dict[str, Any] = {
        "format": FORMAT,
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(runs.device),
        "experiment": options,
        "data": {
            "train": len(data_of(config).part("train")), "test": len(labels),
            "size": digits.shape[-1],
        },
        "planned_runs": len(planned),
    }  # fmt: skip

    def save(done: bool = False) -> Any:
        results = runs.results()
        finished = [] if results is None else results.runs
        for run in finished:
            name = next(r for r in planned if r.identity == run["identity"]).folder
            run["folder"] = f"{RUNS}/{name}/run"
        content["complete"] = len(finished) == len(planned)
        content["seconds"] = round(before + time.perf_counter() - began, 2)
        content.update({"rows": [], "facts": {}} if results is None else results.as_dict())
        content["runs"] = finished
        text = json.dumps(content, indent=1, ensure_ascii=False)
        write_whole(folder / "results.json", lambda to: to.write_text(text, "utf-8"))
        return results

    def tell(run: Run, result: dict[str, Any], left: int) -> None:
        progress.tell(run, result, left)
        save()

    save()
    interrupted = False
    try:
        runs.facts  # noqa: B018  (measures the time of a step while nothing else runs)
        with progress:
            runs.make(jobs, tell, progress.watch, None, "weights", accuracy_by_distance)
    except KeyboardInterrupt:
        interrupted = True
    results = save()
    say = progress.console.print
    if interrupted:
        say(f"Stopped; {len(content['runs'])} of {len(planned)} runs are finished.")
    write_report(folder, content, results, config)
    if results is not None:
        heads, lines = results.table()
        heads = [head.replace("accuracy, ", "") for head in heads]  # to fit into 80 characters
        say(console_table(heads, lines, left=heads[:1], wrap=heads[:1], tight=True))
        say(results.about())
    say(f"{folder / 'report.html'}  ({content['seconds']:.0f} s)", soft_wrap=True)
    return not interrupted


def open_folder(folder: Path, options: dict[str, Any]) -> float:
    """Make the folder of a comparison, and remove an earlier comparison from it.

    The runs of an unfinished comparison with the same options are kept.

    Args:
        folder: the folder.
        options: the options of the experiment.

    Returns:
        The seconds that a kept comparison has taken so far; 0 for a new one.

    Raises:
        ValueError: the folder holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file, want a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        return 0.0
    try:
        earlier = json.loads((folder / "results.json").read_text("utf-8"))
        if earlier["format"] not in FORMATS:
            raise KeyError("format")
        written = [run.get("checkpoint") for run in earlier["runs"]]  # in the first format
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"out: {folder} is not empty and not from an earlier compare; want a new or empty "
            "folder"
        ) from None
    if not earlier["complete"] and earlier.get("experiment") == options:
        return float(earlier["seconds"])
    for name in [*written, "report.html", "results.json"]:
        if name and Path(name).name == name:
            (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / RUNS, ignore_errors=True)
    return 0.0
