"""Changes to trained models: relative tables in place of their attention, and tables of new sizes.

`convert` replaces the self-attention of another library's model with Translution,
`resize_offsets` fits tables to another grid or window, and `make_relative` and `make_shared`
change which projections have tables. `save_converted` and `load_converted` save and load a
converted model.
"""

from .converting import Change, Plan, convert
from .grids import patch_grid
from .module import Converted
from .resizing import make_relative, make_shared, resize_offsets
from .saving import load_converted, save_converted

__all__ = [
    "Change",
    "Converted",
    "Plan",
    "convert",
    "load_converted",
    "make_relative",
    "make_shared",
    "patch_grid",
    "resize_offsets",
    "save_converted",
]
