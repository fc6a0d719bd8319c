"""Attention with a sense of where: Translution, α-Translution and their relatives."""

from . import functional
from .layouts import Layout
from .models import (
    GPT,
    GPTConfig,
    ViT,
    ViTConfig,
    create_model,
    gpt,
    list_models,
    register_model,
    vit,
)
from .modules import (
    ACmix2d,
    AlphaTranslution1d,
    AlphaTranslution2d,
    Convolution2d,
    LocalAttention2d,
    PatchwiseACmix2d,
    PatchwiseAttention2d,
    ReducedACmix2d,
    ReducedAttention2d,
    SelfAttention,
    Translution1d,
    Translution2d,
    Translution3d,
    WindowACmix2d,
    WindowAttention2d,
)

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "ACmix2d",
    "AlphaTranslution1d",
    "AlphaTranslution2d",
    "Convolution2d",
    "GPTConfig",
    "Layout",
    "LocalAttention2d",
    "PatchwiseACmix2d",
    "PatchwiseAttention2d",
    "ReducedACmix2d",
    "ReducedAttention2d",
    "SelfAttention",
    "Translution1d",
    "Translution2d",
    "Translution3d",
    "ViT",
    "ViTConfig",
    "WindowACmix2d",
    "WindowAttention2d",
    "create_model",
    "functional",
    "gpt",
    "list_models",
    "register_model",
    "vit",
]
