"""Train rows of earlier results again, to see whether this version of the library has the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import MEASURES, Run
from .report import store
from .runs import Runs, best_rate

__all__ = ["Repeats", "write_repeats"]


@dataclass
class Repeats(Runs):
    """The first seed of each row of earlier results, at the learning rate that was best then.

    `known` are the earlier results. They do not count as finished runs here, as in `Runs`.
    """

    def planned(self) -> list[Run]:
        """Return the runs: one for each row and regime that the earlier results have whole."""
        found = []
        for arm in self.arms:
            if arm.budget == "steps":
                e = self.experiment
                first = [self._run(arm, rate, e.seed, {}) for rate in e.rates]
                rate = best_rate(e, first, self.earlier)
                found += [run for run in first if run.rate == rate]
        return found

    def result(self, run: Run) -> dict[str, Any] | None:
        """Return the result of a run that was made again, or None."""
        return self._result_here(run)

    def earlier(self, run: Run) -> dict[str, Any] | None:
        """Return the earlier result of a run, or None."""
        return self._known.get(run.identity)

    @property
    def facts(self) -> dict[str, Any]:
        """The costs of the rows, measured again."""
        if self._facts is None:
            self._facts = Runs(self.experiment, self.folder, self.rows, self.budgets).facts
        return self._facts

    def compared(self) -> list[dict[str, Any]]:
        """Return both numbers of each measure and test, for each run that was made again.

        A number is None if the training diverged.
        """
        found = []
        for run in self.planned():
            was, now = self.earlier(run), self.result(run)
            if was is None or now is None:
                continue
            common = {
                "row": run.arm.row, "regime": run.arm.regime, "rate": run.rate, "seed": run.seed,
                "dates": [was["date"], now["date"]], "commits": [was["commit"], now["commit"]],
                "machine": now["machine"],
            }  # fmt: skip
            for test in self.experiment.tests:
                for name in self.experiment.measures:
                    measure = MEASURES[name]
                    numbers = [
                        measure.of(result["tests"][test], "test") if result["tests"] else None
                        for result in (was, now)
                    ]
                    found.append({"test": test, "measure": name, "numbers": numbers, **common})
        return found


def write_repeats(name: str, command: str, repeats: Repeats, docs: Path) -> str:
    """Write both numbers of each run, and both times of a step of each row, into repeated.json.

    Args:
        name: the name of the experiment.
        command: the command that made it.
        repeats: the runs.
        docs: the folder of repeated.json.

    Returns:
        A line that says how many numbers are equal as far as tables show them, and which of the
        others changed most.
    """
    found = repeats.compared()
    docs.mkdir(parents=True, exist_ok=True)
    before, now = (facts["rows"] for facts in (repeats.known["facts"], repeats.facts))
    times = {row: [rows[row]["step_ms"] for rows in (before, now)] for row in now if row in before}
    content = {"command": command, "results": found, "step_ms": times}
    store(docs / "repeated.json", name, content)
    changed = [one for one in found if len(set(_texts(one))) > 1]
    said = f"{len(found) - len(changed)} of {len(found)} numbers are as before"
    if changed:
        most = max(changed, key=_change)
        where = ", ".join(part for part in (most["row"], most["regime"], most["test"]) if part)
        was, now = _texts(most)
        said += f"; most changed: {where}, from {was} to {now}"
    return said


def _texts(one: dict[str, Any]) -> list[str]:
    """Return both numbers as tables show them."""
    measure = MEASURES[one["measure"]]
    return ["diverged" if n is None else measure.words(n) for n in one["numbers"]]


def _change(one: dict[str, Any]) -> float:
    """Return how much a number changed, as a multiple of itself."""
    was, now = one["numbers"]
    return math.inf if now is None else abs(now / was - 1) if was else abs(now)
