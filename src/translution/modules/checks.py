"""Checks that the modules share: each names the argument, what came and what is wanted."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..functional.offset import autocast_enabled

__all__ = ["check_dtype", "check_image", "check_int"]


def check_int(name: str, value: Any, least: int) -> None:
    """Check that `value` is an int (not a bool) of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: got {value!r}, want an int of at least {least}")


def check_dtype(name: str, x: Tensor, weight: Tensor) -> None:
    """Check that an input has the dtype of the weights, unless autocast is on and converts it."""
    if x.dtype != weight.dtype and not autocast_enabled(x):
        raise ValueError(
            f"{name}: got {x.dtype}, want that of the weights, {weight.dtype} (or use autocast)"
        )


def check_image(x: Tensor, channels: int, weight: Tensor) -> None:
    """Check that x is an image [batch, channels, height, width] in the dtype of these weights."""
    if x.ndim != 4 or x.shape[1] != channels or not x.dtype.is_floating_point:
        raise ValueError(
            f"x: got {x.dtype} of shape {tuple(x.shape)}, want floating point of shape "
            f"(batch, {channels}, height, width)"
        )
    check_dtype("x", x, weight)
