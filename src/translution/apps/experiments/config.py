"""The configuration of an experiment, and the runs that follow from it."""

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
from ..training.imports import with_imports

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

Changes = dict[str, Any]  # new values of keys of a configuration, such as {"model.mixer": "alpha"}
BudgetName = Literal["steps", "time", "gpu_time", "parameters"]
BUDGETS: tuple[BudgetName, ...] = ("steps", "time", "gpu_time", "parameters")


@dataclass(frozen=True)
class Measure:
    """A metric and the form in which it is shown.

    Attributes:
        title: the name with the unit.
        metric: the name of the metric in the results of a run.
        higher: whether higher values are better.
        scale: the factor from the metric to the unit.
        digits: the number of digits after the decimal point.
    """

    title: str
    metric: str
    higher: bool
    scale: float = 1.0
    digits: int = 3

    def of(self, metrics: dict[str, float], part: str) -> float:
        """Return the value in its unit.

        Args:
            metrics: the metrics of a run.
            part: the part of the data on which they were measured, such as "test".
        """
        value = metrics[f"{part}_{self.metric}"] * self.scale
        return 2.0**value if self.title == "perplexity per byte" else value

    def text(self, value: float) -> str:
        """Write a value for a table, whose head has the unit."""
        return f"{value:.{self.digits}f}"

    def words(self, value: float) -> str:
        """Write a value with its unit for a sentence, such as "97.2 %"."""
        return f"{self.text(value)} {'%' if self.metric == 'accuracy' else self.title}"


MEASURES = {
    "accuracy": Measure("accuracy, %", "accuracy", True, 100.0, 1),
    "bits_per_byte": Measure("bits per byte", "bits_per_byte", False),
    "perplexity_per_byte": Measure("perplexity per byte", "bits_per_byte", False),
    "perplexity": Measure("perplexity per token", "perplexity", False, 1.0, 1),
}


class Budget(Options):
    """A further comparison, in which rows get as much time or as many parameters as one row.

    like: the row with which the others are made equal.
    rows: the rows that take part; null takes all of them.
    regimes: the regimes that take part; null takes all of them.
    rates: the learning rates to try; null takes the best one of the first comparison.
    step_ms: for gpu_time, the milliseconds of a step of each row; only their ratios matter.
    """

    like: str
    rows: tuple[str, ...] | None = None
    regimes: tuple[str, ...] | None = None
    rates: tuple[float, ...] | None = None
    step_ms: dict[str, float] | None = None


class Experiment(Options):
    """Rows trained with equal steps, each at its own learning rate, over several seeds.

    title: the heading of its section in the results.
    asks: the question below the heading.
    extends: another experiment's file, relative to the folder of this one; keys that are missing in
        the base are taken from its base.
    base: the configuration of a run; rows, regimes and tests change its keys.
    rows: what is compared, such as {"alpha": {"model.mixer": "alpha"}}.
    regimes: the ways to train each row, such as on centred and on moved digits.
    tests: the data on which each row is tested.
    rates: the learning rates. Each row is trained with all of them and the first seed, and with the
        best one (by the first measure on validation data) and the other seeds.
    seeds: the number of seeds.
    seed: the first seed.
    measures: accuracy, bits_per_byte, perplexity_per_byte or perplexity.
    time: a further comparison, with as many steps as fit into the training time of one row.
    gpu_time: the same with times of a step that were measured elsewhere, for example on a GPU. What
        a model learns in a step does not depend on the machine, so such models can train anywhere.
    parameters: a further comparison, with `model.dim` such that every row has as many parameters as
        one of them.
    axis: the title of the figure's horizontal axis, for rows whose names begin with a number.
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
    gpu_time: Budget | None = None
    parameters: Budget | None = None
    axis: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        if not self.measures:
            raise ValueError(f"measures: got none, want some of {list(MEASURES)}")
        for name in BUDGETS[1:]:
            budget: Budget | None = getattr(self, name)
            if budget is None:
                continue
            given = budget.step_ms or {}
            lacking = [
                row for row in (budget.like, *(budget.rows or self.rows)) if row not in given
            ]
            if name == "gpu_time" and lacking:
                raise ValueError(
                    f"gpu_time.step_ms: got {given}, want a time for {lacking[0]!r} too"
                )
            if name != "gpu_time" and given:
                raise ValueError(
                    f"{name}.step_ms: got {given}, want none: only gpu_time takes times"
                )
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
        """Return the combinations of budget, regime and row that are trained with several seeds."""
        found = []
        for budget in BUDGETS:
            if budget not in budgets:
                continue
            given: Budget | None = None if budget == "steps" else getattr(self, budget)
            if budget != "steps" and given is None:
                continue
            for regime in (given and given.regimes) or self.regimes:
                for row in (given and given.rows) or self.rows:
                    if given is None or row != given.like:  # the comparison of equal steps has it
                        found.append(Arm(row, regime, budget))
        return found

    def changes(self, arm: Arm) -> Changes:
        """Return the changes of the base that an arm makes."""
        return self.regimes[arm.regime] | self.rows[arm.row]

    def config(self, arm: Arm, rate: float, seed: int, more: Changes | None = None) -> Config:
        """Return the configuration of a run.

        Args:
            arm: the row, its regime and its budget.
            rate: the learning rate.
            seed: the seed.
            more: further changes, applied last.
        """
        changes = self.changes(arm) | {"train.learning_rate": rate, "seed": seed} | (more or {})
        return self._parse(arm.name, changes)

    def tested(self, arm: Arm, seed: int, test: str) -> Config:
        """Return the configuration with which the runs of an arm are tested."""
        return self._parse(arm.name, self.changes(arm) | {"seed": seed} | self.tests[test])

    def _parse(self, name: str, changes: Changes) -> Config:
        return parse(Config, self.base, name, changes)


def load_experiment(
    path: Path, changes: Sequence[str] = (), imports: list[Path] | None = None
) -> Experiment:
    """Read an experiment from a YAML file.

    Args:
        path: the file.
        changes: changes of its keys, such as "base.train.steps=100".
        imports: further files for `base.imports`.

    Raises:
        ValueError: a key is unknown or has a wrong value; the message names the file and the key.
        OSError: a file cannot be read.
    """
    content = _extended(path)
    if isinstance(content.get("base"), dict):
        content["base"] = with_imports(content["base"], imports)
    return parse(Experiment, content, str(path), changes)


def _extended(path: Path, behind: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a file, and complete its `base` from the file that it extends."""
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
    """Return `under` with its keys replaced by those of `own`, also in nested dictionaries."""
    if not isinstance(own, dict) or not isinstance(under, dict):
        return own
    return under | {key: _over(value, under.get(key)) for key, value in own.items()}


@dataclass(frozen=True)
class Arm:
    """A row that is trained in one regime with one budget.

    Attributes:
        row: the name of the row.
        regime: the name of the regime; "" if the experiment has only one.
        budget: "steps", "time" or "parameters".
    """

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
    """One training run of an experiment.

    Attributes:
        arm: the row, its regime and its budget.
        rate: the learning rate.
        seed: the seed.
        config: the configuration, as `translution train` takes it.
    """

    arm: Arm
    rate: float
    seed: int
    config: Config

    @property
    def folder(self) -> str:
        return f"{self.arm.folder}-{self.rate:g}-{self.seed}"

    @cached_property
    def identity(self) -> str:
        """A hash of everything that affects the numbers of the run, without its data's paths."""
        content = self.config.model_dump(mode="json")
        content.pop("out")
        content.pop("imports")
        for key in ("train", "valid", "test", "folder", "shards", "workers"):
            content["data"].pop(key, None)
        for key in ("device", "workers", "save_every", "log_every"):
            content["train"].pop(key, None)
        plain = {"optimizer": "adamw", "momentum": 0.9, "nesterov": False, "warmup_from": None}
        _drop(content["train"], plain)
        _drop(content["data"].get("augment", {}), {"erasing_fill": "mean"})
        _drop(content["data"], {"document_mask": False, "shift": 0})
        text = json.dumps([self.arm.name, content], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _drop(options: dict[str, Any], plain: dict[str, Any]) -> None:
    """Remove options that have these values: results from before there were such options are
    those of their defaults."""
    for name, value in plain.items():
        if name in options and options[name] == value:
            del options[name]


def slug(name: str) -> str:
    """Return a name in the form in which it is part of the name of a file."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower().replace("α", "alpha")).strip("-.")
