"""`translution experiment`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["experiment"]


def experiment(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Such as experiments/digits.yaml.")],
    rows: Annotated[str | None, typer.Option(help="Some of them, separated by ;")] = None,
    budgets: Annotated[str, typer.Option(help="Of steps, time, parameters.")] = (
        "steps,time,parameters"
    ),
    out: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/experiments"),
    docs: Annotated[Path, typer.Option(help="Where results.md and its figures go.")] = Path("docs"),
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, a thread each.")] = 1,
    keep: Annotated[bool, typer.Option(help="Keep the checkpoints of finished runs.")] = False,
    known: Annotated[
        Path | None, typer.Option(help="Take finished runs from it, such as docs/results.json.")
    ] = None,
    report: Annotated[bool, typer.Option(help="Only write the results; train nothing.")] = False,
) -> None:
    """Train rows alike over several seeds: translution experiment FILE [--base.key=value ...].

    Goes on where it was stopped, and rewrites its table and figure in DOCS/results.md.
    """
    import json
    import time

    from rich.console import Console

    from .config import BUDGETS, load_experiment
    from .report import Results, write_results
    from .runs import Runs, results_of

    console = Console(highlight=False)
    found = load_experiment(file, context.args)
    chosen = rows.split(";") if rows is not None else list(found.rows)
    wanted = budgets.split(",")
    for name, values, have in (("--rows", chosen, found.rows), ("--budgets", wanted, BUDGETS)):
        for value in values:
            if value not in have:
                raise ValueError(f"{name}: got {value!r}, want some of {list(have)}")
    had = {} if known is None else json.loads(known.read_text("utf-8")).get(file.stem, {})
    runs = Runs(found, out / file.stem, chosen, wanted, keep, had)
    command = shlex.join(["translution", "experiment", str(file)])

    def save() -> bool:
        """Write what there is, of all rows and budgets; False where there is nothing yet."""
        every = Runs(found, runs.folder, list(found.rows), BUDGETS, known=had)
        done = list(results_of(every))
        rates = {arm: every.chosen(arm) for arm in every.arms}
        if not any(rates.values()):
            return False
        write_results(file.stem, command, Results(found, done, runs.facts, rates), docs)
        return True

    began = time.perf_counter()
    if not report:
        console.print(f"{file}: timing a step of each row")
        for row, facts in runs.facts["rows"].items():
            console.print(f"  {row}: {facts['parameters']:,} parameters, {facts['step_ms']:.0f} ms")

        def tell(run: object, result: dict, left: int) -> None:  # type: ignore[type-arg]
            tests = ", ".join(
                f"{test} {name} {value:.4g}".strip()
                for test, metrics in result["tests"].items()
                for name, value in metrics.items()
                if not name.endswith(("loss", "skipped", "top5"))
            )
            console.print(
                f"{result['row']} {result['regime']} equal {result['budget']}, rate "
                f"{result['rate']:g}, seed {result['seed']}: {tests or 'diverged'}  "
                f"({result['seconds']:.0f} s; at least {left} to come, "
                f"{time.perf_counter() - began:.0f} s so far)",
                soft_wrap=True,
            )
            save()

        runs.make(jobs, tell)
    if not save():
        raise ValueError(f"--out: there is no finished row in {runs.folder}")
    console.print(f"{docs / 'results.md'}")
