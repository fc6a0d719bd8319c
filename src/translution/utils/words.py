"""Words that messages, tables and figures share."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["MIXER_TITLES", "shortened"]

MIXER_TITLES = {
    "translution": "Translution",
    "alpha": "α-Translution",
    "acmix": "ACmix",
    "attention": "attention, learned positions",
    "rotary": "attention, rotary positions",
    "bias": "attention, relative bias",
    "convolution": "convolution 3×3",
}
"""The title of each mixer in pages, tables and figures, by the mixer's name in options."""


def shortened(names: Sequence[str], between: str = ", ", most: int = 5) -> str:
    """Join names into a message that stays short.

    Args:
        names: the names.
        between: the text that separates two names.
        most: the number of names that are written out.

    Returns:
        The first `most` names; if there are more, the text ends with "and N more".
    """
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return between.join([*names[:most], *more])
