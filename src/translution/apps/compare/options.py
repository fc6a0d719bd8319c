"""What a comparison is asked to do, checked before anything is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...models import ViT, vit
from ...models.blocks import MIXERS
from ...models.configuration import check_choice
from ..training.engine import DEVICES, pick_device

__all__ = ["DATA", "DEFAULT_MIXERS", "REGIMES", "Options"]

DATA = ("digits", "mnist")
DEFAULT_MIXERS = ("attention", "convolution", "acmix", "alpha", "translution")
REGIMES = ("centred", "moved")

# What None stands for, by data set.
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "canvas": 20, "patch": 5, "dim": 48, "depth": 3, "heads": 2,
        "steps": 150, "batch_size": 64, "learning_rate": 3e-3,
    },
    "mnist": {
        "canvas": 84, "patch": 12, "dim": 192, "depth": 6, "heads": 3,
        "steps": 5000, "batch_size": 256, "learning_rate": 3e-4,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Everything that decides the numbers of a comparison. None is the default of the data set."""

    data: str = "digits"
    data_dir: str | None = None
    mixers: tuple[str, ...] = DEFAULT_MIXERS
    seeds: int = 3
    seed: int = 0
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    canvas: int | None = None
    patch: int | None = None
    dim: int | None = None
    depth: int | None = None
    heads: int | None = None
    init: str = "equal"
    train_limit: int | None = None
    test_limit: int | None = None
    device: str = "auto"

    def resolved(self) -> Options:
        """With every default filled in.

        Raises:
            ValueError: naming the option, what came and what is wanted.
        """
        check_choice("data", self.data, DATA)
        check_choice("device", self.device, DEVICES)
        if not self.mixers:
            raise ValueError(f"mixers: got none, want some of {list(MIXERS)}")
        for mixer in self.mixers:
            check_choice("mixers", mixer, list(MIXERS))
        if len(set(self.mixers)) < len(self.mixers):
            raise ValueError(f"mixers: got {','.join(self.mixers)}, want each one once")
        given = {name: getattr(self, name) for name in DEFAULTS[self.data]}
        filled = {n: DEFAULTS[self.data][n] if v is None else v for n, v in given.items()}
        full = replace(self, **filled)
        for name in (*(set(filled) - {"learning_rate"}), "seeds", "train_limit", "test_limit"):
            value = getattr(full, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, want at least 1")
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, want at least 0")
        if not 0 < filled["learning_rate"] < 1:
            raise ValueError(
                f"learning_rate: got {filled['learning_rate']}, want more than 0 and less than 1"
            )
        size = {"digits": 8, "mnist": 28}[full.data]
        if filled["canvas"] <= size:
            raise ValueError(
                f"canvas: got {filled['canvas']} pixels, want more than the {size} of a digit, so "
                "that it can move"
            )
        if filled["canvas"] % filled["patch"]:
            raise ValueError(
                f"patch: got {filled['patch']}, want a divisor of the canvas {filled['canvas']}"
            )
        if filled["dim"] % filled["heads"]:
            raise ValueError(f"heads: got {filled['heads']}, want a divisor of dim {filled['dim']}")
        pick_device(full.device)
        for mixer in full.mixers:
            with torch.random.fork_rng(devices=[]):
                full.model(mixer)
        return full

    def model_config(self, mixer: str) -> dict[str, Any]:
        """The arguments of `translution.vit` that make this mixer's model."""
        if self.dim is None or self.heads is None:
            raise ValueError("options: want resolved() ones")
        return {
            "mixer": mixer, "image_size": self.canvas, "patch_size": self.patch, "in_channels": 1,
            "num_classes": 10, "dim": self.dim, "depth": self.depth, "heads": self.heads,
            "head_dim": self.dim // self.heads, "init": self.init,
        }  # fmt: skip

    def model(self, mixer: str) -> ViT:
        return vit(**self.model_config(mixer))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"mixers": list(self.mixers)}

    def expanded_data_dir(self) -> Path:
        """Where the MNIST files are, or are put."""
        if self.data_dir is None:
            return Path.home() / ".cache" / "translution" / "mnist"
        return Path(self.data_dir).expanduser()
