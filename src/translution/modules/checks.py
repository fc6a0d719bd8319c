"""Checks that the modules share: each names the argument, what came and what is wanted."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.offset import autocast_enabled

__all__ = ["check_dtype", "check_grid", "check_image", "check_int", "check_tensor"]


def check_int(name: str, value: Any, least: int) -> None:
    """Check that `value` is an int (not a bool) of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: got {value!r}, want an int of at least {least}")


def check_dtype(name: str, x: Tensor, layer: nn.Module) -> None:
    """Check that an input has the dtype of a layer's weights, unless autocast converts it.

    A layer whose weights are quantised, or which has none, converts its input itself.
    """
    dtype = getattr(getattr(layer, "weight", None), "dtype", None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return
    if x.dtype != dtype and not autocast_enabled(x):
        raise ValueError(
            f"{name}: got {x.dtype}, want that of the weights, {dtype} (or use autocast)"
        )


def check_tensor(name: str, x: Any, wanted: str) -> None:
    """Check that x is a tensor; `wanted` describes it, for the message."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: got {type(x).__name__}, want a tensor, {wanted}")


def check_image(x: Tensor, channels: int, layer: nn.Module) -> None:
    """Check that x is an image [batch, channels, height, width] in the dtype of a layer."""
    wanted = f"floating point of shape (batch, {channels}, height, width)"
    check_tensor("x", x, wanted)
    fits = x.ndim == 4 and x.shape[1] == channels and min(x.shape[2:]) >= 1
    if not fits or not x.dtype.is_floating_point:
        raise ValueError(
            f"x: got {x.dtype} of shape {tuple(x.shape)}, want {wanted}, each of at least 1"
        )
    check_dtype("x", x, layer)


def check_grid(grid: int | Sequence[int]) -> tuple[int, int]:
    """Rows and columns from one int for both, or from two.

    Raises:
        ValueError: they are not ints of at least 1.
    """
    sizes = (grid, grid) if isinstance(grid, int) else tuple(grid)
    # The sizes must be numbers here, so tracing specialises on them. It knows their type only.
    if len(sizes) == 2 and all(isinstance(n, int) or hasattr(n, "__index__") for n in sizes):
        height, width = (operator.index(n) for n in sizes)
        if height >= 1 and width >= 1:
            return height, width
    raise ValueError(f"grid: got {grid!r}, want two ints of at least 1 (or one for both)")
