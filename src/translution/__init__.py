"""Attention with a sense of where: Translution, α-Translution and their relatives."""

from . import _moved, functional
from ._version import __version__ as __version__
from .interop.convert import convert, make_relative, make_shared, resize_offsets
from .interop.published import export_published, load_published
from .layouts import Layout
from .models import (
    GPT,
    GPTConfig,
    ViT,
    ViTConfig,
    attention_weights,
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

_moved.install()

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
    "attention_weights",
    "convert",
    "create_model",
    "export_published",
    "functional",
    "gpt",
    "list_models",
    "load_published",
    "make_relative",
    "make_shared",
    "register_model",
    "resize_offsets",
    "vit",
]
