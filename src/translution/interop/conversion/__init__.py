"""Changes to trained models: relative tables in place of their attention, and tables of new sizes.

`convert` replaces the self-attention of another library's model with Translution,
`resize_offsets` fits tables to another grid or window, and `make_relative` and `make_shared`
change which projections have tables.
"""

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
