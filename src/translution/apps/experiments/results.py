"""The results of an experiment: cells, columns and tables from its finished runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .config import BUDGETS, MEASURES, Arm, BudgetName, Experiment, Measure

__all__ = ["TITLES", "Cell", "Column", "Results"]

TITLES = {
    "steps": "equal steps", "time": "equal time", "gpu_time": "equal time on a GPU",
    "parameters": "equal parameters",
}  # fmt: skip


MOST_COLUMNS = 4  # of numbers in a short table


@dataclass(frozen=True)
class Cell:
    """One measure of a row, over the seeds with its best learning rate.

    Attributes:
        values: the value of each seed.
        steps: the number of training steps.
        dim: the width of the model, if the configuration has one.
        rate: the learning rate.
    """

    values: tuple[float, ...]
    steps: int
    dim: int | None
    rate: float

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """The standard deviation over the seeds; None for a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self, measure: Measure) -> str:
        """Write mean ± standard deviation; a single seed has no deviation."""
        apart = "" if self.std is None else f" ± {measure.text(self.std)}"
        return measure.text(self.mean) + apart


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        regime: the way in which rows were trained.
        test: the data on which they were tested.
        budget: the comparison, one of `BUDGETS`.
        measure: what is measured.
    """

    regime: str
    test: str
    budget: BudgetName
    measure: Measure

    def title(self, several: bool, measure: str = "") -> str:
        """Return the title of the column.

        Args:
            several: whether the table has several budgets, so that the title names this one.
            measure: the title of the measure; "" leaves it out.
        """
        where = " → ".join(part for part in (self.regime, self.test) if part)
        named = (where, measure, TITLES[self.budget] if several else "")
        return ", ".join(part for part in named if part)


@dataclass
class Results:
    """The results of an experiment.

    Attributes:
        experiment: the experiment.
        runs: the results of its finished runs.
        facts: the costs of its rows, as in `Runs.facts`.
        chosen: the best learning rate of each arm; None if it is not known yet.
    """

    experiment: Experiment
    runs: list[dict[str, Any]]
    facts: dict[str, Any]
    chosen: dict[Arm, float | None]

    @property
    def rows(self) -> list[str]:
        """The names of the rows whose costs are known, which are shown."""
        return [row for row in self.experiment.rows if row in self.facts["rows"]]

    def cell(self, arm: Arm, test: str, measure: Measure) -> Cell | None:
        """Return one measure of an arm on a test, or None without a finished run."""
        rate = self.chosen.get(arm)
        mine = [
            run
            for run in self.runs
            if (run["row"], run["regime"], run["budget"]) == (arm.row, arm.regime, arm.budget)
            and run["rate"] == rate
            and run["tests"]
        ]
        if not mine:
            return None
        values = tuple(measure.of(run["tests"][test], "test") for run in mine)
        return Cell(values, mine[0]["steps"], mine[0]["dim"], mine[0]["rate"])

    def columns(self) -> list[Column]:
        """Return the columns that have at least one number.

        Columns of equal time and equal parameters only exist for the first measure.
        """
        e = self.experiment
        return [
            column
            for regime in e.regimes
            for test in e.tests
            for name in e.measures
            for budget in (BUDGETS if name == e.measures[0] else BUDGETS[:1])
            for column in [Column(regime, test, budget, MEASURES[name])]
            if any(self.cell(Arm(row, regime, budget), test, MEASURES[name]) for row in self.rows)
        ]

    def at(self, column: Column, row: str) -> Cell | None:
        """Return the cell of a row in a column, or None without a finished run."""
        budget = column.budget
        if budget != "steps" and row == getattr(self.experiment, budget).like:
            budget = "steps"  # the other rows are made equal to this one
        return self.cell(Arm(row, column.regime, budget), column.test, column.measure)

    def is_last_trained(self, column: Column) -> bool:
        """Return whether a column is of the first measure, for the last regime and its own test.

        These are the columns that one chooses a row by.
        """
        last = [other for other in self.columns() if other.budget == "steps"][-1]
        same = (column.regime, column.test) == (last.regime, last.test)
        return same and column.measure is MEASURES[self.experiment.measures[0]]

    def main_columns(self) -> list[Column]:
        """Return the columns for a short table: all of them if they are few.

        Otherwise they are those of `is_last_trained`.
        """
        columns = self.columns()
        if len(columns) <= MOST_COLUMNS:
            return columns
        return [column for column in columns if self.is_last_trained(column)]

    def table(self, columns: Sequence[Column] | None = None) -> tuple[list[str], list[list[str]]]:
        """Return the heads and the cells of each row: first its costs, then its numbers.

        The best of a column is between **.

        Args:
            columns: the columns of numbers; None takes all.
        """
        columns = self.columns() if columns is None else columns
        several = any(column.budget != "steps" for column in columns)
        facts = self.facts["rows"]
        first = facts[self.rows[0]]["step_ms"]
        tried = len(self.experiment.rates) > 1
        memory = all("peak_bytes" in facts[row] for row in self.rows)
        heads = ["", "time of a step", "parameters", *["peak MiB"] * memory]
        heads += [column.title(several, column.measure.title) for column in columns]
        heads += ["learning rate"] * tried
        best = {column: self.best(column) for column in columns}
        lines = []
        for row in self.rows:
            cells = [row, f"×{facts[row]['step_ms'] / first:.1f}", f"{facts[row]['parameters']:,}"]
            if memory:
                cells.append(f"{facts[row]['peak_bytes'] / 2**20:.1f}")
            cells += [self.text(column, row, row == best[column]) for column in columns]
            if tried:
                rates = [
                    f"{regime} {rate:g}".strip()
                    for regime in self.experiment.regimes
                    if (rate := self.chosen.get(Arm(row, regime, "steps"))) is not None
                ]
                cells.append(", ".join(rates) or "–")
            lines.append(cells)
        return heads, lines

    def text(self, column: Column, row: str, best: bool = False) -> str:
        """Write a cell of the table; "–" means that there is no finished run.

        Args:
            column: the column.
            row: the name of the row.
            best: whether the value is the best of its column, which is put between **.
        """
        cell = self.at(column, row)
        if cell is None:
            return "–"
        text = cell.text(column.measure)
        text = f"**{text}**" if best else text
        if column.budget in ("time", "gpu_time"):
            return f"{text} ({cell.steps:,} steps)"
        if column.budget == "parameters" and cell.dim is not None:
            return f"{text} (width {cell.dim}, rate {cell.rate:g})"
        return text

    def best(self, column: Column) -> str | None:
        """Return the row that is best in a column beyond chance, or None.

        Its mean differs from that of every other row by more than the standard deviation of either.
        Rows with a single seed have no deviation, so no row is best beside them.
        """
        cells = {row: cell for row in self.rows if (cell := self.at(column, row))}
        if len(cells) < 2:
            return None
        pick = max if column.measure.higher else min
        top = pick(cells, key=lambda row: cells[row].mean)
        for row, cell in cells.items():
            mine, other = cells[top].std, cell.std
            if row == top:
                continue
            if mine is None or other is None:
                return None
            if abs(cells[top].mean - cell.mean) <= max(mine, other):
                return None
        return top

    def about(self) -> str:
        """Say how the numbers were made: seeds, steps, rates, machines, dates and commits."""
        seeds: dict[tuple[Any, ...], int] = {}
        for run in self.runs:
            if run["rate"] == self.chosen.get(Arm(run["row"], run["regime"], run["budget"])):
                key = (run["row"], run["regime"], run["budget"])
                seeds[key] = seeds.get(key, 0) + 1
        counts = sorted(set(seeds.values()))
        steps = sorted({run["steps"] for run in self.runs if run["budget"] == "steps"})
        dates = sorted({run["date"] for run in self.runs})
        commits = sorted({run["commit"] or "unknown" for run in self.runs})
        machines = {json.dumps(run["machine"], sort_keys=True) for run in self.runs}
        computers = []
        for text in sorted(machines):
            m = json.loads(text)
            computers.append(f"{m.get('gpu') or m['cpu']}, {m['cores']} cores, torch {m['torch']}")
        n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        if counts[-1] == 1:
            spread = "one seed"
        elif counts[0] == 1:
            spread = f"mean over {n} seeds, ± standard deviation where there are several"
        else:
            spread = f"mean ± standard deviation over {n} seeds"
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        rates = _listed(self.experiment.rates)
        for name in BUDGETS[1:]:
            budget = getattr(self.experiment, name)
            if budget and budget.rates and any(run["budget"] == name for run in self.runs):
                rates += f" (with {TITLES[name]}: of {_listed(budget.rates)})"
        if len(self.experiment.rates) == 1:
            tried = f"The learning rate is {rates}."
        else:
            tried = (
                f"Each row's learning rate is the best of {rates} on validation data with seed 0."
            )
        return (
            f"Test part, {spread}, {_listed(steps)} steps. {tried} "
            f"{'; '.join(computers)}; {when}; commit {', '.join(commits)}."
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the results in the form of results.json."""
        rows = []
        for column in self.columns():
            for row in self.rows:
                cell = self.at(column, row)
                if cell is not None:
                    rows.append(
                        {
                            "row": row, "trained": column.regime, "tested": column.test,
                            "budget": column.budget, "measure": column.measure.title,
                            "mean": cell.mean, "std": cell.std, "values": cell.values,
                            "steps": cell.steps, "dim": cell.dim, "learning_rate": cell.rate,
                        }
                    )  # fmt: skip
        return {
            "title": self.experiment.title,
            "rows": rows,
            "facts": self.facts,
            "runs": self.runs,
        }


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:,}" if value >= 1 else f"{value:g}" for value in values)
