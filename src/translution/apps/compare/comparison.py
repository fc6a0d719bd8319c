"""Make the experiment of a comparison from a file of this package and the command's options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...models import create_model
from ...models.configuration import check_choice
from ...models.mixers import TABLE_MIXERS, mixer_names
from ...utils.words import MIXER_TITLES
from ..config import parse, read
from ..experiments.config import Arm, Experiment

__all__ = ["DATA", "DEFAULT_MIXERS", "comparison"]

DATA = {"digits": 8, "mnist": 28}  # pixels per side of a digit
DEFAULT_MIXERS = ("attention", "convolution", "acmix", "alpha", "translution")
MNIST = Path.home() / ".cache" / "translution" / "mnist"
POINTS = 40  # the number of points of a training curve
WARM_UP = 0.05  # the fraction of the steps

KEYS = {
    "seeds": "seeds", "seed": "seed", "steps": "base.train.steps",
    "batch_size": "base.train.batch_size", "canvas": "base.data.canvas",
    "patch": "base.model.patch_size", "dim": "base.model.dim", "depth": "base.model.depth",
    "heads": "base.model.heads",
    "train_limit": "base.data.train_limit", "test_limit": "base.data.test_limit",
    "device": "base.train.device",
}  # fmt: skip
"""The key of the experiment that each option of the command changes."""


def comparison(
    data: str = "digits",
    mixers: Sequence[str] = DEFAULT_MIXERS,
    learning_rate: float | None = None,
    data_dir: str | None = None,
    init: str | None = None,
    imports: Sequence[str] = (),
    **options: Any,
) -> Experiment:
    """Make an experiment that trains mixers on centred and on moved digits and tests them on both.

    Args:
        data: the data set, a key of `DATA`.
        mixers: the names of the mixers; each becomes a row.
        learning_rate: the largest learning rate; None keeps that of the file.
        init: the initialisation of tables, for the mixers that have tables.
        data_dir: the folder of MNIST's files; None takes a folder in the user's cache.
        imports: Python files that register mixers; they are executed already.
        options: other options of the command, by their names in `KEYS`; None keeps the value of the
            file.

    Raises:
        ValueError: an option has a wrong value.
    """
    check_choice("data", data, list(DATA))
    if not mixers:
        raise ValueError(f"mixers: got none, want some of {mixer_names()}")
    for mixer in mixers:
        if mixer not in (names := mixer_names()):
            raise ValueError(
                f"mixers: got {mixer!r}, want some of {names}; --import FILE adds those that the "
                "file registers"
            )
    if len(set(mixers)) < len(mixers):
        raise ValueError(f"mixers: got {','.join(mixers)}, want each one once")
    if learning_rate is not None and not 0 < learning_rate < 1:
        raise ValueError(f"learning_rate: got {learning_rate}, want more than 0 and less than 1")
    content = read(Path(__file__).with_name(f"{data}.yaml"))
    rows = {MIXER_TITLES.get(mixer, mixer): {"model.mixer": mixer} for mixer in mixers}
    for changes_of_row in rows.values():
        if init is not None and changes_of_row["model.mixer"] in TABLE_MIXERS:
            changes_of_row["model.init"] = init
    changes: dict[str, Any] = {
        KEYS[name]: value for name, value in options.items() if value is not None
    }
    if imports:
        changes["base.imports"] = list(imports)
    if data == "mnist":
        changes["base.data.folder"] = str(
            MNIST if data_dir is None else Path(data_dir).expanduser()
        )
    if learning_rate is not None:
        changes["rates"] = [learning_rate]
    steps = changes.get("base.train.steps", content["base"]["train"]["steps"])
    changes["base.train.warmup"] = max(1, round(steps * WARM_UP))
    changes["base.train.log_every"] = max(1, math.ceil(steps / POINTS))
    found = parse(Experiment, content | {"rows": rows}, "compare", changes)
    canvas, size = found.base["data"]["canvas"], DATA[data]
    if canvas <= size:
        raise ValueError(
            f"canvas: got {canvas} pixels, want more than the {size} of a digit, so that it can "
            "move"
        )
    for row in (
        rows
    ):  # checks the model's sizes, which it otherwise takes from the data, before there are data
        model = found.config(Arm(row, "moved", "steps"), found.rates[0], found.seed).model
        with torch.device("meta"):
            create_model(
                model.name, image_size=canvas, in_channels=1, num_classes=10, **model.given
            )
    return found
