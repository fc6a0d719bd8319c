"""What an experiment is made from, and the runs that it asks for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ..config import Options, Seed, parse, read
from ..training.config import Config

__all__ = [
    "BUDGETS",
    "MEASURES",
    "Arm",
    "Budget",
    "Experiment",
    "Measure",
    "Run",
    "load_experiment",
]

Changes = dict[str, Any]  # of a configuration, such as {"model.mixer": "alpha"}
BudgetName = Literal["steps", "time", "parameters"]
BUDGETS: tuple[BudgetName, ...] = ("steps", "time", "parameters")


@dataclass(frozen=True)
class Measure:
    """How a metric is shown, and which end of it is better."""

    title: str
    metric: str
    higher: bool
    scale: float = 1.0
    digits: int = 3

    def of(self, metrics: dict[str, float], part: str) -> float:
        """The value in its unit, from what a run measured on a part of the data."""
        value = metrics[f"{part}_{self.metric}"] * self.scale
        return 2.0**value if self.title == "perplexity per byte" else value

    def text(self, value: float) -> str:
        """As in a table, whose head has the unit."""
        return f"{value:.{self.digits}f}"

    def words(self, value: float) -> str:
        """As in a sentence: "97.2 %", "2.070 bits per byte"."""
        return f"{self.text(value)} {'%' if self.metric == 'accuracy' else self.title}"


MEASURES = {
    "accuracy": Measure("accuracy, %", "accuracy", True, 100.0, 1),
    "bits_per_byte": Measure("bits per byte", "bits_per_byte", False),
    "perplexity_per_byte": Measure("perplexity per byte", "bits_per_byte", False),
    "perplexity": Measure("perplexity per token", "perplexity", False, 1.0, 1),
}


class Budget(Options):
    """A second comparison, in which rows get as much as the row `like`.

    rows, regimes: those that take part; null is all of them.
    rates: tried as in the first comparison; null takes the one that was best there.
    """

    like: str
    rows: tuple[str, ...] | None = None
    regimes: tuple[str, ...] | None = None
    rates: tuple[float, ...] | None = None


class Experiment(Options):
    """Rows trained with equal steps, each at its own learning rate, over several seeds.

    title, asks: of its part in the results.
    extends: another experiment's file, named from this one's folder; its base stands wherever this
        one's has nothing else.
    base: a run's configuration; the rest are changes of it, {"model.mixer": "alpha"}.
    rows: what is compared. regimes: ways to train each of them. tests: what each is tested on.
    rates: learning rates. Each row runs with all of them and the first seed, and with the best by
        the first measure on validation data for the other seeds.
    seeds: how many. seed: the first of them.
    measures: accuracy, bits_per_byte, perplexity_per_byte, perplexity.
    time: also with steps as many as take the time of the row `like`.
    parameters: also with `model.dim` such that there are as many parameters as in the row `like`.
    axis: what the rows' numbers are, where the names of rows begin with one; for the figure.
    """

    title: str
    asks: str
    extends: str | None = None
    base: dict[str, Any]
    rows: dict[str, Changes] = Field(min_length=1)
    regimes: dict[str, Changes] = Field({"": {}}, min_length=1)
    tests: dict[str, Changes] = Field({"": {}}, min_length=1)
    rates: tuple[float, ...] = Field(min_length=1)
    seeds: int = Field(3, ge=1, le=1000)
    seed: Seed = 0
    measures: tuple[Literal[tuple(MEASURES)], ...]  # type: ignore[valid-type]
    time: Budget | None = None
    parameters: Budget | None = None
    axis: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        if not self.measures:
            raise ValueError(f"measures: got none, want some of {list(MEASURES)}")
        for name in ("time", "parameters"):
            budget: Budget | None = getattr(self, name)
            if budget is None:
                continue
            for key, wanted, have in (
                ("like", (budget.like,), self.rows),
                ("rows", budget.rows or (), self.rows),
                ("regimes", budget.regimes or (), self.regimes),
            ):
                for one in wanted:
                    if one not in have:
                        raise ValueError(f"{name}.{key}: got {one!r}, want one of {list(have)}")
        names = [*self.rows, *self.regimes]
        if wrong := [name for name in names if name and slug(name) == ""]:
            raise ValueError(f"rows: got {wrong[0]!r}, want names with a letter or digit")
        for arm in self.arms(BUDGETS):
            self.config(arm, self.rates[0], self.seed)
        for test in self.tests:
            self.tested(next(iter(self.arms(BUDGETS))), self.seed, test)
        return self

    def arms(self, budgets: Sequence[str]) -> list[Arm]:
        """What is trained over the seeds: by budget, regime and row."""
        found = []
        for budget in BUDGETS:
            if budget not in budgets:
                continue
            given: Budget | None = None if budget == "steps" else getattr(self, budget)
            if budget != "steps" and given is None:
                continue
            for regime in (given and given.regimes) or self.regimes:
                for row in (given and given.rows) or self.rows:
                    if given is None or row != given.like:  # which has it already
                        found.append(Arm(row, regime, budget))
        return found

    def changes(self, arm: Arm) -> Changes:
        return self.regimes[arm.regime] | self.rows[arm.row]

    def config(self, arm: Arm, rate: float, seed: int, more: Changes | None = None) -> Config:
        """Of one run; `more` comes last."""
        changes = self.changes(arm) | {"train.learning_rate": rate, "seed": seed} | (more or {})
        return self._parse(arm.name, changes)

    def tested(self, arm: Arm, seed: int, test: str) -> Config:
        return self._parse(arm.name, self.changes(arm) | {"seed": seed} | self.tests[test])

    def _parse(self, name: str, changes: Changes) -> Config:
        return parse(Config, self.base, name, changes)


def load_experiment(path: Path, changes: Sequence[str] = ()) -> Experiment:
    """The experiment in a YAML file, with changes such as "base.train.steps=100".

    Raises:
        ValueError: naming the file, the key, what came and what is allowed.
        OSError: a file that cannot be read.
    """
    return parse(Experiment, _extended(path), str(path), changes)


def _extended(path: Path, behind: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's content, its `base` filled up from the file that it extends."""
    content = read(path)
    named = content.get("extends")
    if not isinstance(named, str):
        return content
    if path.resolve() in behind:
        raise ValueError(f"{path}: extends: got {named!r}, which extends this one")
    under = path.parent / named
    if not under.is_file():
        raise ValueError(f"{path}: extends: got {named!r}, want a file in {path.parent}")
    base = _extended(under, (*behind, path.resolve())).get("base")
    return content | {"base": _over(content.get("base", {}), base)}


def _over(own: Any, under: Any) -> Any:
    """`under` with the keys of `own` put over its own."""
    if not isinstance(own, dict) or not isinstance(under, dict):
        return own
    return under | {key: _over(value, under.get(key)) for key, value in own.items()}


@dataclass(frozen=True)
class Arm:
    """A row, trained in one way with one budget."""

    row: str
    regime: str
    budget: BudgetName

    @property
    def name(self) -> str:
        return ", ".join(part for part in (self.row, self.regime, f"equal {self.budget}") if part)

    @property
    def folder(self) -> str:
        return "-".join(slug(part) for part in (self.budget, self.regime, self.row) if part)


@dataclass(frozen=True)
class Run:
    """One training: what `translution train` would do with the configuration, in a folder."""

    arm: Arm
    rate: float
    seed: int
    config: Config

    @property
    def folder(self) -> str:
        return f"{self.arm.folder}-{self.rate:g}-{self.seed}"

    @cached_property
    def identity(self) -> str:
        """A hash of all that decides the run's numbers; where its data lie does not."""
        content = self.config.model_dump(mode="json")
        content.pop("out")
        for key in ("train", "valid", "test", "folder", "shards", "workers"):
            content["data"].pop(key, None)
        for key in ("device", "workers", "save_every", "log_every"):
            content["train"].pop(key, None)
        text = json.dumps([self.arm.name, content], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def slug(name: str) -> str:
    """A name as a part of a file's."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower().replace("α", "alpha")).strip("-.")
