"""The runs that an experiment needs: which are finished, and how the others are carried out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...utils.files import write_whole
from ...utils.measuring import commit_here, machine
from ..training.devices import pick_device
from .config import BUDGETS, MEASURES, Arm, Budget, Experiment, Run
from .costs import costs_of, data_of, parameters_of, widened
from .making import RESULT, Keep, Maker, Measuring, Watch, working
from .results import TITLES, Results

__all__ = ["Runs", "best_rate"]


@dataclass
class Runs:
    """The runs of an experiment in a folder.

    Attributes:
        experiment: the experiment.
        folder: the folder of the runs.
        rows: the names of the rows that are wanted.
        budgets: the budgets that are wanted.
        known: the part of a results.json for this experiment; its runs are not repeated.
    """

    experiment: Experiment
    folder: Path
    rows: Sequence[str]
    budgets: Sequence[str]
    known: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._known = {run["identity"]: run for run in self.known.get("runs", [])}
        self._facts: dict[str, Any] | None = None
        self._more: dict[Arm, dict[str, Any]] = {}
        self._made: dict[tuple[Arm, float, int], Run] = {}

    @property
    def arms(self) -> list[Arm]:
        """The wanted combinations of row, regime and budget."""
        return [arm for arm in self.experiment.arms(self.budgets) if arm.row in self.rows]

    def planned(self) -> list[Run]:
        """Return all runs that are known so far.

        The runs of an arm with other seeds than the first are known once its rate is chosen.
        """
        return [run for arm in self.arms for run in self.runs_of(arm)]

    def runs_of(self, arm: Arm) -> list[Run]:
        """Return the runs of an arm that are known so far."""
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
            if not {arm.row, budget.like} <= set(self.facts["rows"]):
                return []  # a row that is not wanted now, and was never timed
            if arm not in self._more:
                self._more[arm] = self.more_of(arm, budget.like)
            more = self._more[arm]
        first = [self._run(arm, rate, experiment.seed, more) for rate in rates]
        chosen = best_rate(experiment, first, self.result)
        if chosen is None and len(rates) > 1:
            return first
        others = range(experiment.seed + 1, experiment.seed + experiment.seeds)
        return first + [self._run(arm, chosen or rates[0], seed, more) for seed in others]

    def _run(self, arm: Arm, rate: float, seed: int, more: dict[str, Any]) -> Run:
        """Return a run, and store it, since building and hashing a configuration takes time."""
        if (arm, rate, seed) not in self._made:
            config = self.experiment.config(arm, rate, seed, more)
            self._made[arm, rate, seed] = Run(arm, rate, seed, config)
        return self._made[arm, rate, seed]

    def chosen(self, arm: Arm) -> float | None:
        """Return the best learning rate of an arm, or None while a rate has not run."""
        first = [run for run in self.runs_of(arm) if run.seed == self.experiment.seed]
        return best_rate(self.experiment, first, self.result)

    def result(self, run: Run) -> dict[str, Any] | None:
        """Return the result of a run, or None if it is not finished.

        Raises:
            ValueError: the folder holds a run with another configuration.
        """
        found = self._result_here(run)
        return self._known.get(run.identity) if found is None else found

    def _result_here(self, run: Run) -> dict[str, Any] | None:
        """Return the result of a run in the folder, or None if there is none."""
        path = self.folder / run.folder / RESULT
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if found["identity"] != run.identity:
            raise ValueError(
                f"out: {path.parent} holds a run of another configuration (its run/config.yaml has "
                "it); want another folder, or that one removed"
            )
        return found

    def name(self, run: Run) -> str:
        """Describe a run, without the properties that all runs of the experiment share."""
        e, arm = self.experiment, run.arm
        budgets = [budget for name in BUDGETS[1:] if (budget := getattr(e, name)) is not None]
        rates = set(e.rates).union(*(budget.rates or () for budget in budgets))
        parts = [arm.row, arm.regime, TITLES[arm.budget] if budgets else ""]
        parts += [f"rate {run.rate:g}" if len(rates) > 1 else "", f"seed {run.seed}"]
        return ", ".join(part for part in parts if part)

    def make(
        self,
        jobs: int,
        tell: Callable[[Run, dict[str, Any], int], None],
        watch: Watch = lambda *_: None,
        threads: int | None = 1,
        keep: Keep = "nothing",
        measuring: Measuring | None = None,
        tensorboard: bool = False,
    ) -> None:
        """Carry out the missing runs, with the first seed of all rows before the other seeds.

        Args:
            jobs: the number of runs at the same time; a single one runs in this process.
            tell: takes each finished run, its result, and the number of runs that are left.
            watch: takes the progress of the runs.
            threads: the threads of a single job; None leaves torch's default. Several jobs have one
                thread each.
            keep: see `Maker`.
            measuring: see `Maker`.
            tensorboard: see `Maker`.
        """
        about = machine(self.device)
        about.pop("threads")
        source = {"commit": commit_here(), "machine": about}
        maker = Maker(self.experiment, self.folder, source, keep, measuring, tensorboard)
        going: dict[Any, Run] = {}
        with working(jobs, watch, threads) as (pool, pass_on):
            while True:
                known = {run.folder for run in going.values()}
                missing = [
                    run
                    for run in self.planned()
                    if run.folder not in known and self.result(run) is None
                ]
                missing.sort(key=lambda run: run.seed)
                for run in missing[: jobs - len(going)]:
                    going[pool.submit(maker, run)] = run
                if not going:
                    return
                left = len(known) + len(missing)
                while not (done := wait(going, 0.2, FIRST_COMPLETED).done):
                    pass_on()
                pass_on()
                for job in done:
                    left -= 1
                    tell(going.pop(job), job.result(), left)

    @property
    def device(self) -> str:
        """The device on which models train: cuda, mps or cpu."""
        e = self.experiment
        return pick_device(e.config(e.arms(BUDGETS)[0], e.rates[0], e.seed).train.device)

    @property
    def facts(self) -> dict[str, Any]:
        """The costs of rows in their first regime (see `costs_of`), and the machine.

        The rows are those that are wanted, the first one and those that others are made equal to.
        They are measured once, in steps that alternate between all rows, and stored, since the runs
        of equal time depend on them. A row that is added later is timed together with the first
        earlier row, and its time is scaled so that the time of the earlier row stays the same.
        """
        if self._facts is None:
            path = self.folder / "facts.json"
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = json.loads(path.read_text("utf-8")) if path.exists() else None
            self._facts = kept or self.known.get("facts") or {"machine": machine("cpu"), "rows": {}}
            rows = self._facts["rows"]
            e = self.experiment
            budgets = [budget for name in self.budgets if (budget := getattr(e, name, None))]
            needed = {next(iter(e.rows)), *self.rows, *(budget.like for budget in budgets)}
            new = [row for row in e.rows if row in needed and row not in rows]
            if new:
                beside, regime = [row for row in e.rows if row in rows][:1], next(iter(e.regimes))
                configs = {
                    row: e.config(Arm(row, regime, "steps"), e.rates[0], e.seed)
                    for row in [*beside, *new]
                }
                for row, config in configs.items():
                    parameters_of(
                        config, row
                    )  # refuses a model that cannot be built, and names its row
                found = dict(zip(configs, costs_of(list(configs.values())), strict=True))
                for row in beside:
                    scale = rows[row]["step_ms"] / found.pop(row)["step_ms"]
                    for cost in found.values():
                        cost["step_ms"] = round(scale * cost["step_ms"], 2)
                rows |= found
                text = json.dumps(self._facts, indent=1)
                write_whole(path, lambda to: to.write_text(text, "utf-8"))
        return self._facts

    def more_of(self, arm: Arm, like: str) -> dict[str, Any]:
        """Return the changes of the configuration for a budget, such as the number of steps."""
        config = self.experiment.config(arm, self.experiment.rates[0], self.experiment.seed)
        rows = self.facts["rows"]
        if arm.budget in ("time", "gpu_time"):
            times = {row: facts["step_ms"] for row, facts in rows.items()}
            if arm.budget == "gpu_time":
                assert self.experiment.gpu_time is not None
                times = self.experiment.gpu_time.step_ms or times
            steps = data_of(config).steps * times[like] / times[arm.row]
            return {"train.steps": max(1, round(steps)), "train.epochs": None}
        return {"model.dim": widened(config, rows[like]["parameters"])}

    def results(self) -> Results | None:
        """Return the results of all finished runs, also of rows and budgets not wanted now.

        It is None as long as no row has a best learning rate.
        """
        every = Runs(self.experiment, self.folder, list(self.experiment.rows), BUDGETS, self.known)
        every._made, every._more, every._facts = self._made, self._more, self._facts
        done = [found for run in every.planned() if (found := every.result(run)) is not None]
        chosen = {arm: every.chosen(arm) for arm in every.arms}
        if not any(chosen.values()):
            return None
        return Results(self.experiment, done, every.facts, chosen)


def best_rate(
    experiment: Experiment, runs: list[Run], result: Callable[[Run], dict[str, Any] | None]
) -> float | None:
    """Return the learning rate that is best by the first measure on validation data.

    Args:
        experiment: the experiment.
        runs: a run for each rate.
        result: returns the result of a run, or None if it is not finished.

    Returns:
        The rate, or None if a run is not finished.

    Raises:
        ValueError: the training diverged with every rate.
    """
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
