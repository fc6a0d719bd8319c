"""Attention with a sense of where: Translution, α-Translution and their relatives."""

from . import functional
from .layouts import Layout
from .models import GPT, ViT, create_model, gpt, list_models, register_model, vit
from .modules import (
    ACmix2d,
    AlphaTranslution1d,
    AlphaTranslution2d,
    Convolution2d,
    SelfAttention,
    Translution1d,
    Translution2d,
    Translution3d,
)

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "ACmix2d",
    "AlphaTranslution1d",
    "AlphaTranslution2d",
    "Convolution2d",
    "Layout",
    "SelfAttention",
    "Translution1d",
    "Translution2d",
    "Translution3d",
    "ViT",
    "create_model",
    "functional",
    "gpt",
    "list_models",
    "register_model",
    "vit",
]
