"""Planning an experiment's runs and making them, in several processes if wanted."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ...models import create_model
from ...utils.files import write_whole
from ...utils.measuring import commit_here, machine, seconds_in_turn
from ..data.images import Images
from ..training.checkpoints import latest
from ..training.config import Config
from ..training.data import Data, Parts
from ..training.engine import pick_device, terminate
from ..training.run import evaluate, model_of, train
from .config import MEASURES, Arm, Budget, Experiment, Run

__all__ = ["Runs"]

REPEATS = 5  # of the timing of a step
RESULT = "result.json"


@dataclass
class Runs:
    """The runs of an experiment in a folder: those that are there, and those to make.

    rows, budgets: those that are wanted. keep: the checkpoints of finished runs. known: what
    `write_results` wrote of them elsewhere: its runs are not made again.
    """

    experiment: Experiment
    folder: Path
    rows: Sequence[str]
    budgets: Sequence[str]
    keep: bool = False
    known: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._known = {run["identity"]: run for run in self.known.get("runs", [])}
        self.source = source()
        self._facts: dict[str, Any] | None = None
        self._more: dict[Arm, dict[str, Any]] = {}

    @property
    def arms(self) -> list[Arm]:
        return [arm for arm in self.experiment.arms(self.budgets) if arm.row in self.rows]

    def planned(self) -> list[Run]:
        """All that can be named by now: the other seeds of an arm only when its rate is chosen."""
        return [run for arm in self.arms for run in self.runs_of(arm)]

    def runs_of(self, arm: Arm) -> list[Run]:
        experiment = self.experiment
        budget: Budget | None = None
        more: dict[str, Any] = {}
        rates = experiment.rates
        if arm.budget != "steps":
            budget = getattr(experiment, arm.budget)
            assert budget is not None
            if budget.rates is not None:
                rates = budget.rates
            elif (chosen := self.chosen(Arm(arm.row, arm.regime, "steps"))) is not None:
                rates = (chosen,)
            else:
                return []
            if arm not in self._more:
                self._more[arm] = self.more_of(arm, budget.like)
            more = self._more[arm]
        first = [Run(arm, rate, 0, experiment.config(arm, rate, 0, more)) for rate in rates]
        chosen = best_rate(experiment, first, self.result)
        if chosen is None:
            return first
        others = range(1, experiment.seeds)
        return first + [
            Run(arm, chosen, seed, experiment.config(arm, chosen, seed, more)) for seed in others
        ]

    def chosen(self, arm: Arm) -> float | None:
        """The learning rate that was best on validation data, once all have run."""
        return best_rate(self.experiment, [r for r in self.runs_of(arm) if not r.seed], self.result)

    def result(self, run: Run) -> dict[str, Any] | None:
        """What a finished run left.

        Raises:
            ValueError: it was another run.
        """
        path = self.folder / run.folder / RESULT
        if not path.exists():
            return self._known.get(run.identity)
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if found["identity"] != run.identity:
            raise ValueError(
                f"out: {path.parent} holds a run of another configuration (its run/config.yaml has "
                "it); want another folder, or that one removed"
            )
        return found

    def make(self, jobs: int, tell: Callable[[Run, dict[str, Any], int], None]) -> None:
        """Make what is missing; tells each result, and how many runs are still to come."""
        context = get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin) as pool:
            going: dict[Any, Run] = {}
            before = signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                while True:
                    known = {run.folder for run in going.values()}
                    missing = [
                        run
                        for run in self.planned()
                        if run.folder not in known and self.result(run) is None
                    ]
                    for run in missing[: jobs - len(going)]:
                        job = pool.submit(
                            make_run, self.experiment, run, self.folder, self.source, self.keep
                        )
                        going[job] = run
                    if not going:
                        return
                    for job in wait(going, return_when=FIRST_COMPLETED).done:
                        run = going.pop(job)
                        tell(run, job.result(), len(going) + len(missing))
            except BaseException:
                terminate(pool)  # the checkpoints of its runs stay
                raise
            finally:
                signal.signal(signal.SIGTERM, before)

    @property
    def facts(self) -> dict[str, Any]:
        """Of each row and regime: parameters, and the milliseconds of a training step here, in turn
        with those of all others. Measured once, and kept."""
        if self._facts is None:
            path = self.folder / "facts.json"
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = json.loads(path.read_text("utf-8")) if path.exists() else None
            self._facts = kept or self.known.get("facts", {})
            rows = self.experiment.rows
            if set(self._facts.get("rows", {})) != set(rows):
                regime, rate = next(iter(self.experiment.regimes)), self.experiment.rates[0]
                configs = {
                    row: self.experiment.config(Arm(row, regime, "steps"), rate, 0) for row in rows
                }
                self._facts = {"machine": machine("cpu"), "rows": {}}
                sizes = [parameters_of(config, row) for row, config in configs.items()]
                times = seconds_of_steps(list(configs.values()))
                for row, parameters, seconds in zip(rows, sizes, times, strict=True):
                    self._facts["rows"][row] = {
                        "parameters": parameters, "step_ms": round(1e3 * seconds, 2)
                    }  # fmt: skip
                text = json.dumps(self._facts, indent=1)
                write_whole(path, lambda to: to.write_text(text, "utf-8"))
        return self._facts

    def more_of(self, arm: Arm, like: str) -> dict[str, Any]:
        """What the budget changes."""
        config = self.experiment.config(arm, self.experiment.rates[0], 0)
        rows = self.facts["rows"]
        if arm.budget == "time":
            steps = data_of(config).steps * rows[like]["step_ms"] / rows[arm.row]["step_ms"]
            return {"train.steps": max(1, round(steps)), "train.epochs": None}
        return {"model.dim": widened(config, rows[like]["parameters"])}


def best_rate(
    experiment: Experiment, runs: list[Run], result: Callable[[Run], dict[str, Any] | None]
) -> float | None:
    """By the first measure on validation data; None while a run is missing."""
    measure = MEASURES[experiment.measures[0]]
    found = {}
    for run in runs:
        had = result(run)
        if had is None:
            return None
        found[run.rate] = measure.of(had["valid"], "valid") if had["valid"] else math.nan
    if not runs:
        return None
    whole = {rate: value for rate, value in found.items() if math.isfinite(value)}
    if not whole:
        raise ValueError(f"rates: every one of {list(found)} diverged for {runs[0].arm.name!r}")
    return (max if measure.higher else min)(whole, key=lambda rate: whole[rate])


def make_run(
    experiment: Experiment, run: Run, out: Path, source: dict[str, Any], keep: bool
) -> dict[str, Any]:
    """Train, going on where an earlier try ended, and test; leaves result.json."""
    folder = out / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    result: dict[str, Any] = {
        "row": run.arm.row, "regime": run.arm.regime, "budget": run.arm.budget, "rate": run.rate,
        "seed": run.seed, "identity": run.identity,
    }  # fmt: skip
    with (
        open(folder / "log.txt", "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        config = run.config
        try:
            valid: dict[str, float] | None = train(
                config, folder / "run", resume=True, parts=parts_of(config)
            )
        except ValueError as error:
            if not str(error).startswith("loss: is "):
                raise
            valid = None  # this rate is too high: a result like any other
        tests: dict[str, Any] = {}
        if valid is not None:
            at = latest(folder / "run" / "checkpoints")
            assert at is not None
            for test in experiment.tests:
                tested = experiment.tested(run.arm, run.seed, test)
                tests[test] = evaluate(at, "test", tested, parts_of(tested))
    result |= {
        "steps": data_of(config).steps,
        "dim": config.model.given.get("dim"),
        "parameters": parameters_of(config),
        "valid": valid,
        "tests": tests,
        "seconds": round(time.perf_counter() - began, 1),
        "date": date.today().isoformat(),
        **source,
    }
    text = json.dumps(result, indent=1)
    write_whole(folder / RESULT, lambda to: to.write_text(text, "utf-8"))
    if not keep:
        shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    gc.collect()  # a trainer and its data are a cycle, and hold more than the collector sees
    return result


def _begin() -> None:
    torch.set_num_threads(1)


def source() -> dict[str, Any]:
    """The commit of the library, where this is known, and the machine."""
    about = machine(pick_device("auto"))
    return {"commit": commit_here(), "machine": {k: about[k] for k in about if k != "threads"}}


@functools.lru_cache(4)
def _parts(data: str) -> Parts:
    """Those that are open of the data with these options, for all runs that have the same."""
    return {}


def parts_of(config: Config) -> Parts:
    return _parts(f"{config.seed} {config.data.model_dump_json()}")


def data_of(config: Config) -> Data:
    return Data(config, parts=parts_of(config))


def model_on(config: Config, device: str) -> tuple[torch.nn.Module, Data]:
    data = data_of(config)
    name, options = model_of(config, data)
    with torch.device(device):
        return create_model(name, **options), data


def parameters_of(config: Config, row: str = "") -> int:
    """row: what to blame where there is no such model."""
    try:
        return sum(p.numel() for p in model_on(config, "meta")[0].parameters())
    except ValueError as error:
        raise ValueError(f"rows: {row}: {error}" if row else str(error)) from None


def widened(config: Config, parameters: int) -> int:
    """The width with about as many parameters: a multiple of 4 channels per head."""
    options = config.model.given
    step = 4 * int(options.get("heads", 1))

    def missed(dim: int) -> float:
        changed = config.model.model_copy(update={"dim": dim})
        found = parameters_of(config.model_copy(update={"model": changed}))
        return math.log(found / parameters)

    low, high = 1, 2
    while missed(high * step) < 0:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if missed(middle * step) < 0 else (low, middle)
    return step * min((low, high), key=lambda n: abs(missed(n * step)))


def seconds_of_steps(configs: list[Config]) -> list[float]:
    """The median time of a training step of each, in turn, with the one thread of a run."""
    device = torch.device(pick_device(configs[0].train.device))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return seconds_in_turn([_stepper(config, device) for config in configs], device, REPEATS)
    finally:
        torch.set_num_threads(threads)


def _stepper(config: Config, device: torch.device) -> Callable[[], object]:
    model, data = model_on(config, "cpu")
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    size = config.train.batch_size // config.train.accumulate
    if isinstance(data.part("train"), Images):
        facts = data.facts
        x = torch.randn(size, facts["in_channels"], *facts["image_size"], device=device)
        y = torch.zeros(size, dtype=torch.int64, device=device)
    else:
        x = torch.zeros(size, data.facts["context"], dtype=torch.int64, device=device)
        y = x.flatten()

    def step() -> None:
        for _ in range(config.train.accumulate):
            logits = model(x)
            F.cross_entropy(logits.flatten(0, -2), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def results_of(runs: Runs) -> Iterator[dict[str, Any]]:
    """Of all finished runs of the experiment, whichever rows are wanted now."""
    for run in runs.planned():
        found = runs.result(run)
        if found is not None:
            yield found
