"""Models made of the modules, each read top to bottom in one file."""

from .gpt import GPT, GPTConfig, gpt
from .registry import create_model, list_models, register_model
from .vit import ViT, ViTConfig, vit

__all__ = [
    "GPT",
    "GPTConfig",
    "ViT",
    "ViTConfig",
    "create_model",
    "gpt",
    "list_models",
    "register_model",
    "vit",
]
