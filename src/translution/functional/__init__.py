"""The operators as functions; `translution.modules` has them with their weights.

`offset.py`: scores and mix over pairs whose projections depend on their class (Translution).
`convolution.py`: a convolution taken apart into 1×1 convolutions, shifts and sums.
`neighborhood.py`: attention and mixing over the k×k neighbourhood of each place.
"""

from .convolution import convolution_by_shifts, shift_and_sum, shift_kernels
from .neighborhood import neighborhood_attention, neighborhood_mix
from .offset import masked_softmax, offset_mix, offset_scores

__all__ = [
    "convolution_by_shifts",
    "masked_softmax",
    "neighborhood_attention",
    "neighborhood_mix",
    "offset_mix",
    "offset_scores",
    "shift_and_sum",
    "shift_kernels",
]
