"""Helpers for the configurations of models: building, checking and reading them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

from .._renamed import current_arguments

__all__ = [
    "check_choice",
    "check_positive",
    "configure",
    "head_dim_of",
    "height_width",
    "hidden_channels",
    "input_shape",
]

C = TypeVar("C")


def configure(kind: type[C], **fields: Any) -> C:
    """A configuration of this kind from its fields.

    Raises:
        ValueError: a field that does not exist (the message lists those that do), or a value that
            does not fit.
    """
    fields = current_arguments(kind, fields, stacklevel=3)
    known = list(kind.__dataclass_fields__)  # type: ignore[attr-defined]
    for name in fields:
        check_choice(f"option of {kind.__name__}", name, known)
    return kind(**fields)


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Return `value` if it is one of the choices.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, want one of {list(choices)}")
    return value


def check_positive(config: Any, *names: str) -> None:
    """Check that these fields of a configuration are at least 1.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: got {getattr(config, name)}, want at least 1")


def height_width(value: int | Sequence[int]) -> tuple[int, ...]:
    """(height, width) from one int for both or from a sequence."""
    return (value, value) if isinstance(value, int) else tuple(value)


def input_shape(config: Any) -> tuple[int, ...]:
    """The shape of one sample of a model: (context,) for text, and (in_channels, height, width) for
    images, with 224 pixels where a model takes images of any size."""
    if hasattr(config, "context"):
        return (config.context,)
    return (config.in_channels, *getattr(config, "image_size", (224, 224)))


def head_dim_of(dim: int, heads: int, head_dim: int | None) -> int:
    """`head_dim`, or where it is None dim / heads.

    Raises:
        ValueError: heads does not divide dim, or head_dim is less than 1.
    """
    if head_dim is None:
        if dim % heads:
            raise ValueError(f"heads: got {heads}, want a divisor of dim {dim} (or give head_dim)")
        return dim // heads
    if head_dim < 1:
        raise ValueError(f"head_dim: got {head_dim}, want at least 1")
    return head_dim


def hidden_channels(dim: int, ratio: float, name: str = "mlp_ratio") -> int:
    """The hidden channels of an MLP, from its channels and their ratio.

    Raises:
        ValueError: the ratio is negative or not finite; the message calls it `name`.
    """
    if not 0 <= ratio < math.inf:
        raise ValueError(f"{name}: got {ratio}, want a finite number of at least 0")
    return int(dim * ratio)
