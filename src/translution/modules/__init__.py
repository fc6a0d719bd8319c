"""Modules: tokens in, tokens out."""

from .attention import (
    AlphaTranslution1d,
    AlphaTranslution2d,
    SelfAttention,
    Translution1d,
    Translution2d,
    Translution3d,
)
from .convolution import Convolution2d
from .projections import INITS, RelativeLinear

__all__ = [
    "INITS",
    "AlphaTranslution1d",
    "AlphaTranslution2d",
    "Convolution2d",
    "RelativeLinear",
    "SelfAttention",
    "Translution1d",
    "Translution2d",
    "Translution3d",
]
