"""The configuration of a run, which `translution train` reads."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from ...models import create_model, list_models, model_options
from ...models.description import read_description
from ...models.pretrained import newest
from ...models.registry import current_options
from ...utils.files import write_whole
from ..config import Count, Options, Place, Seed, as_yaml, parse, shown
from ..data.images import ImageOptions
from ..data.text import TextOptions
from .imports import import_files

__all__ = ["Config", "ModelOptions", "TrainOptions", "config_file"]


LARGEST = 1e30  # a float32 can hold it, also if an optimizer multiplies it
# The options that an optimizer does not use, and that must have their defaults.
UNUSED = {"adamw": ("momentum", "nesterov"), "sgd": ("betas",)}


class ModelOptions(Options):
    """A model and its options.

    name: "vit", "gpt", "resnet" or any other name of `translution.list_models`.

    All further keys are options of that model. Those that follow from the data (image_size,
    in_channels, num_classes, vocab_size, context) are set by the run.
    """

    model_config = ConfigDict(extra="allow")

    name: str

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, given: Any) -> Any:
        """Read the option names of earlier versions."""
        if not isinstance(given, dict) or given.get("name") not in list_models():
            return given
        options = {option: value for option, value in given.items() if option != "name"}
        return {"name": given["name"], **current_options(given["name"], options)}

    @model_validator(mode="after")
    def _check(self) -> ModelOptions:
        known = model_options(self.name)
        for option, value in (self.model_extra or {}).items():
            if option not in known:
                raise ValueError(f"{option}: {self.name!r} has no such option, but {sorted(known)}")
            try:
                _adapter(known[option]).validate_python(value)
            except ValidationError as error:
                said = error.errors()[0]["msg"]
                raise ValueError(
                    f"{option}: got {shown(value)}, {said[0].lower()}{said[1:]}"
                ) from None
        for option, value in self.given.items():
            _check_size(option, value)
        return self

    @property
    def given(self) -> dict[str, Any]:
        """The options that were given, as values of their types: YAML reads 1e3 as a text."""
        known, extra = model_options(self.name), self.model_extra or {}
        return {
            option: _adapter(known[option]).validate_python(value)
            for option, value in extra.items()
        }

    def complete(self, from_data: dict[str, Any]) -> dict[str, Any]:
        """The name and all options with their defaults, without those that follow from the data.

        A named size is replaced by the options that it stands for.

        Args:
            from_data: options that follow from the data, as far as the configuration tells them.

        Raises:
            ValueError: options that do not fit together.
        """
        known = model_options(self.name)
        options = {k: v for k, v in from_data.items() if k in known} | self.given
        with torch.device("meta"):
            model = create_model(self.name, **options)
        complete = {"name": self.name} | {k: v for k, v in self.given.items() if k in FROM_DATA}
        for field in dataclasses.fields(model.config):  # type: ignore[arg-type]
            if field.name not in FROM_DATA:
                # null stays null, so that what follows from other options still follows from them
                derived = field.default is None and field.name not in self.given
                complete[field.name] = None if derived else getattr(model.config, field.name)
        return complete


def _check_size(option: str, value: Any) -> None:
    """Check numbers that no model of this library can have: torch refuses them in its own words,
    or a process that builds so many layers never ends.

    Raises:
        ValueError: such a number.
    """
    most = MOST_LAYERS if option in ("depth", "depths") else MOST_NUMBER
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, int | float) and abs(number) > most:
            raise ValueError(f"{option}: got {shown(value)}, want no number above {most:,}")


MOST_NUMBER, MOST_LAYERS = 2**24, 10_000


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    """What checks and converts an option of this type."""
    return TypeAdapter(hint, config=_LAX)


# options that follow from the data
FROM_DATA = {"image_size", "in_channels", "num_classes", "vocab_size", "context"}
_LAX = ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False)


class TrainOptions(Options):
    """The optimisation, and the devices that it runs on.

    steps, epochs: the length of the run; exactly one of them is given. A step is one update of the
        weights.
    batch_size: the number of samples in a step, over all devices.
    accumulate: the number of parts that a batch is divided into, which are computed in turn.
    learning_rate: the peak of the learning rate.
    warmup: the number of steps in which the learning rate rises linearly to its peak. If the run
        is not longer than that, the warm-up is a tenth of the run, and the run says so.
    warmup_from: the learning rate of the first step of the warm-up. null is
        learning_rate / (warmup + 1), as if it rose from 0.
    schedule: after the warm-up, "cosine" lowers the learning rate to min_learning_rate at the last
        step, and "constant" keeps it.
    optimizer: "adamw", or "sgd" with momentum.
    betas: those of AdamW.
    momentum: that of SGD. nesterov: whether it is Nesterov's.
    weight_decay: AdamW subtracts this share of a parameter, times the learning rate, in each step;
        SGD adds this multiple of it to its gradient.
    decay: "all" applies it to all parameters, "matrices" to those with at least two axes, and
        "weights" to those of them that are no position bias, learned position or class token.
    clip: the largest norm of the gradient; null does not clip.
    label_smoothing: that of the cross-entropy.
    ema: the decay of an exponential moving average of the weights, which is then evaluated and
        saved in their place; null keeps none.
    precision: "bfloat16" and "float16" use autocast.
    compile: compile the model with torch.compile.
    validate_every, save_every, log_every: intervals in steps.
    validate_batches: the number of batches of a validation; null uses all.
    device: "auto" is the first of cuda, mps and cpu that the machine has.
    devices, nodes: the number of devices per machine, and of machines.
    strategy: how several devices share the work. "ddp" copies the model to each, "fsdp" divides it.
    offset_ranks: the number of devices that tables are divided over (docs/scaling.md).
    workers: the number of processes that load data, per device.
    """

    steps: Count | None = None
    epochs: float | None = Field(None, gt=0, le=1e9)
    batch_size: int = Field(64, ge=1, le=2**20)
    accumulate: int = Field(1, ge=1, le=2**20)
    learning_rate: float = Field(3e-4, gt=0, le=LARGEST)
    min_learning_rate: float = Field(0.0, ge=0, le=LARGEST)
    warmup: int = Field(0, ge=0, le=10**12)
    warmup_from: float | None = Field(None, ge=0, le=LARGEST)
    schedule: Literal["cosine", "constant"] = "cosine"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(0.05, ge=0, le=1e6)
    decay: Literal["all", "matrices", "weights"] = "all"
    clip: float | None = Field(None, gt=0, le=LARGEST)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    ema: float | None = Field(None, gt=0, lt=1)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    validate_every: Count = 500
    validate_batches: Count | None = None
    save_every: Count = 500
    log_every: Count = 10
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = Field(1, ge=1, le=1024)
    nodes: int = Field(1, ge=1, le=2**20)
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    offset_ranks: int = Field(1, ge=1, le=2**20)
    workers: int = Field(0, ge=0, le=1024)

    def warmup_within(self, steps: int) -> int:
        """`warmup`, or a tenth of the steps if the run is not longer than the warm-up."""
        return self.warmup if self.warmup < steps else steps // 10

    @model_validator(mode="after")
    def _check(self) -> TrainOptions:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"want steps or epochs, got {self.steps} and {self.epochs} (=null removes one)"
            )
        if self.min_learning_rate and self.schedule == "constant":
            raise ValueError(
                f"min_learning_rate: got {self.min_learning_rate}, but the schedule 'constant' "
                "does not lower the rate; want 0, or the schedule 'cosine'"
            )
        for name in ("epochs", "learning_rate", "weight_decay", "clip"):
            if (value := getattr(self, name)) is not None and not math.isfinite(value):
                raise ValueError(f"{name}: got {value}, want a finite number")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate: got {self.min_learning_rate}, want at most learning_rate "
                f"{self.learning_rate}"
            )
        if self.warmup_from is not None and not self.warmup:
            raise ValueError(
                f"warmup_from: got {self.warmup_from}, but there is no warm-up; want null, or a "
                "warmup"
            )
        if self.warmup_from is not None and self.warmup_from > self.learning_rate:
            raise ValueError(
                f"warmup_from: got {self.warmup_from}, want at most learning_rate "
                f"{self.learning_rate}"
            )
        for name in UNUSED[self.optimizer]:
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ValueError(
                    f"{name}: got {value}, but the optimizer {self.optimizer!r} does not use it; "
                    f"want {default}"
                )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {self.betas}, want two of at least 0 and less than 1")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: got True with a momentum of 0, want a momentum")
        ranks = self.devices * self.nodes
        if ranks % self.offset_ranks:
            raise ValueError(
                f"offset_ranks: got {self.offset_ranks}, want a divisor of the {ranks} devices"
            )
        parts = self.accumulate * ranks // self.offset_ranks
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size: got {self.batch_size}, want a multiple of {parts}, the parts that it "
                "is divided into (accumulate × devices × nodes / offset_ranks)"
            )
        return self


class Config(Options):
    """The configuration of one run.

    imports: Python files that register mixers (`translution.register_mixer`) or models
        (`translution.models.registry.register_family`); --import adds one.
        They are executed before the configuration is read further, and in each process of the run.
    out: the folder of the run. null is a folder in runs/ with the name of the configuration's file.
    seed: decides all random numbers.
    model, data, train: what is trained, on what, and how.
    """

    imports: Annotated[tuple[Place, ...], AfterValidator(import_files)] = ()
    out: Place | None = None
    seed: Seed = 0
    model: ModelOptions
    data: Annotated[ImageOptions | TextOptions, Field(discriminator="kind")]
    train: TrainOptions

    def print_complete(self) -> str:
        """The configuration as YAML, with all defaults, also those of the model."""
        data = self.data
        given: dict[str, Any] = {"context": getattr(data, "context", None)}
        if data.kind == "images":
            given = {"image_size": data.image_size, "in_channels": data.channels}
        return as_yaml(self, model=self.model.complete(given))

    def folder(self, path: Path) -> Path:
        """The folder of the run whose configuration is the file `path`."""
        return Path("runs") / path.stem if self.out is None else Path(self.out).expanduser()


def config_file(path: Path) -> Path:
    """The YAML file of a configuration, which may be given as the folder of a run.

    If the file is missing in the folder of a run, it is written again from the configuration in a
    checkpoint, with a warning.

    Raises:
        ValueError: there is no such file; the message suggests similar names.
    """
    file = path / "config.yaml" if path.is_dir() else path
    if file.is_file():
        return file
    if path.is_dir() and _restored(path, file):
        return file
    if path.is_dir():
        raise ValueError(
            f"CONFIG: {path} is a folder without config.yaml; want a file or the folder of a run"
        )
    existing = [*path.parent.glob("*.yaml"), *Path("recipes").glob("*.yaml")]
    names = {file.stem: str(file) for file in existing}
    close = [names[name] for name in difflib.get_close_matches(path.stem, names, n=3)]
    meant = f"; did you mean {' or '.join(close)}?" if close else ", want a YAML file"
    raise ValueError(f"CONFIG: no such file {path}{meant}")


def _restored(run: Path, file: Path) -> bool:
    """Write the configuration of a run from its newest checkpoint that can be read."""
    for kind in ("last", "best"):
        checkpoint = newest(run / "checkpoints", kind)
        if checkpoint is None:
            continue
        try:
            content = read_description(checkpoint).config or {}
            text = as_yaml(parse(Config, content, str(checkpoint)))
        except (ValueError, OSError):
            continue
        write_whole(file, lambda to, text=text: to.write_text(text, "utf-8"))
        warnings.warn(f"{file} was missing, and is written again from {checkpoint}", stacklevel=3)
        return True
    return False
