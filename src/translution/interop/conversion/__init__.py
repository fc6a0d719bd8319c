"""From what is trained already: attention of other libraries, other grids, other sharing."""

from .converting import Change, Plan, convert
from .module import Converted
from .resizing import make_relative, make_shared, resize_offsets

__all__ = [
    "Change",
    "Converted",
    "Plan",
    "convert",
    "make_relative",
    "make_shared",
    "resize_offsets",
]
