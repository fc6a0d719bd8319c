"""The operators as functions. The layers in `translution.modules` hold their weights.

`offset.py`: scores and mix over pairs whose projections depend on the offset class (Translution).
`single_query.py`: the same for one new token, as in text generation.
`neighborhood.py`: attention and mixing over the k×k neighbourhood of each position of a map.
`derivatives.py`, `flop_counts.py`: what torch needs to know about the operators.
`convolution.py`: a convolution decomposed into 1×1 convolutions, shifts and sums.
"""

from . import flop_counts
from .convolution import convolution_by_shifts, shift_and_sum, shift_kernels
from .neighborhood import neighborhood_attention, neighborhood_mix
from .offset import masked_softmax, offset_mix, offset_scores

flop_counts.register_when_imported()

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
