"""The command `translution experiment`, which runs an experiment."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ..training.import_option import ImportOption

__all__ = ["experiment"]


def experiment(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="The experiment, such as experiments/digits.yaml.")],
    rows: Annotated[
        str | None,
        typer.Option(help="Names of rows to train, separated by semicolons; default all."),
    ] = None,
    budgets: Annotated[str, typer.Option(help="One or more of steps,time,gpu_time,parameters.")] = (
        "steps,time,gpu_time,parameters"
    ),
    out: Annotated[Path, typer.Option(help="The folder of the runs.")] = Path("runs/experiments"),
    docs: Annotated[Path, typer.Option(help="The folder of results.md and its figures.")] = Path(
        "docs"
    ),
    jobs: Annotated[
        int,
        typer.Option(help="Runs at the same time, one thread each; 0 takes one per core of a CPU."),
    ] = 1,
    keep: Annotated[bool, typer.Option(help="Keep the checkpoints of finished runs.")] = False,
    known: Annotated[
        Path | None, typer.Option(help="A file with finished runs, such as docs/results.json.")
    ] = None,
    repeat: Annotated[
        bool,
        typer.Option(
            "--repeat",
            help="Time and train the first seed of each row of --known again, and write both "
            "numbers into DOCS/repeated.json.",
        ),
    ] = False,
    report: Annotated[
        bool, typer.Option(help="Write the results of finished runs, and train nothing.")
    ] = False,
    imports: ImportOption = None,
) -> None:
    """Train rows alike over several seeds: translution experiment FILE [--base.key=value ...].

    The command continues where it was stopped, and writes its table and figure into
    DOCS/results.md.
    """
    import importlib.util
    import json
    from typing import Any

    from ..config import read_text
    from .config import BUDGETS, Run, load_experiment
    from .making import jobs_on
    from .progress import RunsProgress
    from .repeating import Repeats, write_repeats
    from .report import write_results
    from .runs import Runs

    found = load_experiment(file, context.args, imports)
    chosen = rows.split(";") if rows is not None else list(found.rows)
    wanted = budgets.split(",")
    for name, values, have in (("--rows", chosen, found.rows), ("--budgets", wanted, BUDGETS)):
        for value in values:
            if value not in have:
                raise ValueError(f"{name}: got {value!r}, want some of {list(have)}")
    had: dict[str, Any] = {}
    if known is not None:
        try:
            had = json.loads(read_text(known)).get(file.stem, {})
        except (ValueError, AttributeError) as error:
            raise ValueError(f"--known: {known} is not results of experiments: {error}") from None
    if repeat and not had:
        raise ValueError(f"--repeat: want a file with results of {file.stem} as --known")
    kind = Repeats if repeat else Runs
    runs = kind(
        found, out / (f"{file.stem}-repeated" if repeat else file.stem), chosen, wanted, had
    )
    jobs = jobs_on(runs.device, jobs)
    command = shlex.join(["translution", "experiment", str(file)])
    progress = RunsProgress(runs)
    say = progress.console.print

    def save() -> bool:
        """Write the results of finished runs; return False if there are none yet."""
        results = runs.results()
        if results is not None:
            write_results(file.stem, command, results, docs)
        return results is not None

    def tell(run: Run, result: dict[str, Any], left: int) -> None:
        progress.tell(run, result, left)
        save()

    if not report:
        say(f"{file}: timing a step of each row")
        for row, facts in runs.facts["rows"].items():
            say(f"  {row}: {facts['parameters']:,} parameters, {facts['step_ms']:.0f} ms")
        with progress:
            runs.make(
                jobs, progress.tell if repeat else tell, progress.watch,
                keep="everything" if keep else "nothing",
                tensorboard=importlib.util.find_spec("tensorboard") is not None,
            )  # fmt: skip
    if isinstance(runs, Repeats):
        command += f" --known {shlex.quote(str(known))} --repeat"
        said = write_repeats(file.stem, command, runs, docs)
        say(f"{file.stem}: {said}", soft_wrap=True)
        return
    if not save():
        raise ValueError(f"--out: there is no finished row in {runs.folder}")
    say(f"{docs / 'results.md'}", soft_wrap=True)
