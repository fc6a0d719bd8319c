"""Modules with weights: Translution and attention over tokens, ACmix and its parents over images.

Over tokens: `attention.py` (the common skeleton), `self_attention.py`, `translution.py`, `alpha.py`
and `convolution.py`. ACmix: `acmix.py` and, for other backbones, `window.py`, `reduced.py` and
`patchwise.py`; each also holds the attention without a convolution.
"""

from .acmix import ACmix2d, LocalAttention2d
from .alpha import AlphaTranslution1d, AlphaTranslution2d
from .convolution import Convolution2d
from .convolution_path import ConvolutionPath
from .patchwise import PatchwiseACmix2d, PatchwiseAttention2d
from .projections import INITS, RelativeLinear
from .reduced import ReducedACmix2d, ReducedAttention2d
from .self_attention import SelfAttention
from .translution import Translution1d, Translution2d, Translution3d
from .window import WindowACmix2d, WindowAttention2d

__all__ = [
    "INITS",
    "ACmix2d",
    "AlphaTranslution1d",
    "AlphaTranslution2d",
    "Convolution2d",
    "ConvolutionPath",
    "LocalAttention2d",
    "PatchwiseACmix2d",
    "PatchwiseAttention2d",
    "ReducedACmix2d",
    "ReducedAttention2d",
    "RelativeLinear",
    "SelfAttention",
    "Translution1d",
    "Translution2d",
    "Translution3d",
    "WindowACmix2d",
    "WindowAttention2d",
]
