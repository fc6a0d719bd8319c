"""A table of all models and what they cost."""

from .counts import Costs, Entry, costs, entry

__all__ = ["Costs", "Entry", "costs", "entry"]
