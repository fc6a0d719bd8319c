"""How messages and tables say things."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["MIXER_TITLES", "some"]

MIXER_TITLES = {
    "translution": "Translution",
    "alpha": "α-Translution",
    "acmix": "ACmix",
    "attention": "attention, learned positions",
    "rotary": "attention, rotary positions",
    "bias": "attention, relative bias",
    "convolution": "convolution 3×3",
}
"""What pages, tables and figures call a mixer, by its name in options."""


def some(names: Sequence[str], between: str = ", ", most: int = 5) -> str:
    """The first `most` names, and how many more there are."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return between.join([*names[:most], *more])
