"""Modules with weights: Translution and attention on tokens, ACmix and its parents on images."""

from .acmix import ConvolutionPath
from .attention import (
    AlphaTranslution1d,
    AlphaTranslution2d,
    SelfAttention,
    Translution1d,
    Translution2d,
    Translution3d,
)
from .convolution import Convolution2d
from .local import ACmix2d, LocalAttention2d
from .patchwise import PatchwiseACmix2d, PatchwiseAttention2d
from .projections import INITS, RelativeLinear
from .reduced import ReducedACmix2d, ReducedAttention2d
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
