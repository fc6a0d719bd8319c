"""What the finished runs of an experiment give: cells, columns, tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .config import BUDGETS, MEASURES, Arm, BudgetName, Experiment, Measure

__all__ = ["Cell", "Column", "Results"]

TITLES = {"steps": "equal steps", "time": "equal time", "parameters": "equal parameters"}


@dataclass(frozen=True)
class Cell:
    """One measure of an arm over the seeds of its chosen learning rate."""

    values: tuple[float, ...]
    steps: int
    dim: int | None
    rate: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self, measure: Measure) -> str:
        apart = "" if self.std is None else f" ± {measure.text(self.std)}"
        return measure.text(self.mean) + apart


class Column(NamedTuple):
    """Of a table: what rows were trained on, what they were tested on, and with which budget."""

    regime: str
    test: str
    budget: BudgetName
    measure: Measure

    def title(self, several: bool, measure: str = "") -> str:
        """several: there are columns of other budgets too. measure: to be named between."""
        where = " → ".join(part for part in (self.regime, self.test) if part)
        named = (where, measure, TITLES[self.budget] if several else "")
        return ", ".join(part for part in named if part)


@dataclass
class Results:
    """The finished runs of an experiment, and what its rows cost (`Runs.facts`)."""

    experiment: Experiment
    runs: list[dict[str, Any]]
    facts: dict[str, Any]
    chosen: dict[Arm, float | None]

    def cell(self, arm: Arm, test: str, measure: Measure) -> Cell | None:
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
        """Those that have a number; of budgets beyond the first, the first measure alone."""
        e = self.experiment
        return [
            column
            for regime in e.regimes
            for test in e.tests
            for name in e.measures
            for budget in (BUDGETS if name == e.measures[0] else BUDGETS[:1])
            for column in [Column(regime, test, budget, MEASURES[name])]
            if any(self.cell(Arm(row, regime, budget), test, MEASURES[name]) for row in e.rows)
        ]

    def at(self, column: Column, row: str) -> Cell | None:
        budget = column.budget
        if budget != "steps" and row == getattr(self.experiment, budget).like:
            budget = "steps"  # the others get what it has
        return self.cell(Arm(row, column.regime, budget), column.test, column.measure)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Heads, and the cells of each row; the best of each column is between **."""
        columns = self.columns()
        several = any(column.budget != "steps" for column in columns)
        heads = ["", *(column.title(several, column.measure.title) for column in columns)]
        facts = self.facts["rows"]
        first = facts[next(iter(self.experiment.rows))]["step_ms"]
        tried = len(self.experiment.rates) > 1
        memory = all("peak_bytes" in facts[row] for row in self.experiment.rows)
        heads += ["parameters", "time of a step"]
        heads += ["learning rate"] * tried + ["peak MiB"] * memory
        best = {column: self.best(column) for column in columns}
        lines = []
        for row in self.experiment.rows:
            cells = [row, *(self.text(column, row, row in best[column]) for column in columns)]
            cells += [f"{facts[row]['parameters']:,}", f"×{facts[row]['step_ms'] / first:.1f}"]
            if tried:
                rates = [
                    f"{regime} {rate:g}".strip()
                    for regime in self.experiment.regimes
                    if (rate := self.chosen.get(Arm(row, regime, "steps"))) is not None
                ]
                cells.append(", ".join(rates) or "–")
            if memory:
                cells.append(f"{facts[row]['peak_bytes'] / 2**20:.1f}")
            lines.append(cells)
        return heads, lines

    def text(self, column: Column, row: str, best: bool = False) -> str:
        """A cell of the table, between ** where it is the best of its column; – without a run."""
        cell = self.at(column, row)
        if cell is None:
            return "–"
        text = cell.text(column.measure)
        text = f"**{text}**" if best else text
        if column.budget == "time":
            return f"{text} ({cell.steps:,} steps)"
        if column.budget == "parameters" and cell.dim is not None:
            return f"{text} (width {cell.dim}, rate {cell.rate:g})"
        return text

    def best(self, column: Column) -> set[str]:
        """Of at least two rows, those with the best mean, to the digits that are shown."""
        measure = column.measure
        means = {row: cell.mean for row in self.experiment.rows if (cell := self.at(column, row))}
        if len(means) < 2:
            return set()
        top = measure.text((max if measure.higher else min)(means.values()))
        return {row for row, mean in means.items() if measure.text(mean) == top}

    def about(self) -> str:
        """What the numbers are, and where they come from."""
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
        spread = "one seed" if n == "1" else f"mean ± standard deviation over {n} seeds"
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
        rows = []
        for column in self.columns():
            for row in self.experiment.rows:
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
