"""The names of the parts of a data set."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["PARTS", "Part"]

Part = Literal["train", "valid", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
