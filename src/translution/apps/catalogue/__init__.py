"""A table of all models and what they cost."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .counts import Costs, Entry, costs, entry

__all__ = ["Costs", "Entry", "costs", "entry"]


def __getattr__(name: str) -> Any:
    """From `counts`, when it is asked for: it imports torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import counts

    return getattr(counts, name)
