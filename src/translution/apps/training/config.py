"""What a run is made from: the configuration that `translution train` reads."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from ...models import model_options
from ..config import Options
from ..data.images import ImageOptions
from ..data.text import TextOptions

__all__ = ["Config", "ModelOptions", "TrainOptions", "config_file"]


class ModelOptions(Options):
    """A model by its name ("vit", "gpt", "resnet", … or any of `translution.list_models`), and any
    of its options beside it. What follows from the data (image_size, channels, num_classes,
    vocab_size, context) need not be given."""

    model_config = ConfigDict(extra="allow")

    name: str

    @model_validator(mode="after")
    def _check(self) -> ModelOptions:
        known = model_options(self.name)
        for option, value in self.given.items():
            if option not in known:
                raise ValueError(f"{option}: {self.name!r} has no such option, but {sorted(known)}")
            try:
                TypeAdapter(known[option], config=_LAX).validate_python(value)
            except ValidationError as error:
                said = error.errors()[0]["msg"]
                raise ValueError(f"{option}: got {value!r}, {said[0].lower()}{said[1:]}") from None
        return self

    @property
    def given(self) -> dict[str, Any]:
        """The options that were given; numbers stand for names such as "50"."""
        known = model_options(self.name)
        return {
            option: str(value) if known.get(option) is str else value
            for option, value in (self.model_extra or {}).items()
        }


_LAX = ConfigDict(coerce_numbers_to_str=True)


class TrainOptions(Options):
    """The optimisation, and where it runs.

    steps, epochs: how long; one of them. One step is one change of the weights.
    batch_size: samples per step, over all devices and accumulated parts.
    accumulate: parts that a step's batch is computed in, one after the other.
    learning_rate: its peak. warmup: steps in which it rises linearly to there. Then schedule
        "cosine" takes it to min_learning_rate at the last step, "constant" leaves it.
    weight_decay: AdamW's, on all parameters, or with decay="matrices" on those of two axes or more.
    clip: largest norm of the gradient; null does not clip.
    label_smoothing: of the cross-entropy.
    ema: decay of the averaged weights, which are then those evaluated and saved; null for none.
    precision: "bfloat16" and "float16" are autocast.
    compile: torch.compile the model.
    validate_every, save_every, log_every: steps. validate_batches: at most so many; null for all.
    device: "auto" takes cuda, mps or cpu. devices: how many of each node; nodes.
    strategy: how several devices share the work: "ddp" holds the model on each, "fsdp" divides it.
    offset_ranks: over how many devices the tables' classes are divided (docs/scaling.md).
    workers: processes that load data, per device.
    """

    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    batch_size: int = Field(64, ge=1)
    accumulate: int = Field(1, ge=1)
    learning_rate: float = Field(3e-4, gt=0)
    min_learning_rate: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = Field(0.05, ge=0)
    decay: Literal["all", "matrices"] = "all"
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = Field(None, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    ema: float | None = Field(None, gt=0, lt=1)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    validate_every: int = Field(500, ge=1)
    validate_batches: int | None = Field(None, ge=1)
    save_every: int = Field(500, ge=1)
    log_every: int = Field(10, ge=1)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = Field(1, ge=1)
    nodes: int = Field(1, ge=1)
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    offset_ranks: int = Field(1, ge=1)
    workers: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> TrainOptions:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"want steps or epochs, got {self.steps} and {self.epochs} (the other one is taken "
                "away with =null)"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate: got {self.min_learning_rate}, want at most learning_rate "
                f"{self.learning_rate}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {self.betas}, want two of at least 0 and less than 1")
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
    """One run. out: its folder; null is runs/ and the name of the configuration's file."""

    out: str | None = None
    seed: int = Field(0, ge=0)
    model: ModelOptions
    data: Annotated[ImageOptions | TextOptions, Field(discriminator="kind")]
    train: TrainOptions

    def folder(self, path: Path) -> Path:
        return Path("runs") / path.stem if self.out is None else Path(self.out).expanduser()


def config_file(path: Path) -> Path:
    """The YAML file that is meant: itself, or that of a run's folder.

    Raises:
        ValueError: there is none; it names recipes that are called like it.
    """
    found = path / "config.yaml" if path.is_dir() else path
    if found.is_file():
        return found
    if path.is_dir():
        raise ValueError(f"CONFIG: {path} is a folder without config.yaml; want a file or a run's")
    there = [*path.parent.glob("*.yaml"), *Path("recipes").glob("*.yaml")]
    names = {file.stem: str(file) for file in there}
    close = [names[name] for name in difflib.get_close_matches(path.stem, names, n=3)]
    meant = f"; did you mean {' or '.join(close)}?" if close else ", want a YAML file"
    raise ValueError(f"CONFIG: no such file {path}{meant}")
