"""How messages say things."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["some"]


def some(names: Sequence[str], between: str = ", ", most: int = 5) -> str:
    """The first few, and how many more there are."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return between.join([*names[:most], *more])
