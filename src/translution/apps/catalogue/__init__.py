"""The catalogue: a table of all models with their parameters, multiply-adds and memory."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .counts import Costs, Entry, costs, entry

__all__ = ["Costs", "Entry", "costs", "entry"]


def __getattr__(name: str) -> Any:
    """Import a name from `counts` when it is first used, since `counts` imports torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import counts

    return getattr(counts, name)
