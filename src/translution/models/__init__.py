"""Models made of the modules, each read top to bottom in one file."""

from .attention_weights import attention_weights
from .backbone import Backbone
from .gpt import GPT, GPTConfig, gpt
from .pretrained import Pretrained
from .pvt import PVT, PVTConfig, pvt
from .registry import create_model, list_models, model_options, register_model
from .resnet import ResNet, ResNetConfig, resnet
from .san import SAN, SANConfig, san
from .swin import Swin, SwinConfig, swin
from .vit import ViT, ViTConfig, vit

__all__ = [
    "GPT",
    "PVT",
    "SAN",
    "Backbone",
    "GPTConfig",
    "PVTConfig",
    "Pretrained",
    "ResNet",
    "ResNetConfig",
    "SANConfig",
    "Swin",
    "SwinConfig",
    "ViT",
    "ViTConfig",
    "attention_weights",
    "create_model",
    "gpt",
    "list_models",
    "model_options",
    "pvt",
    "register_model",
    "resnet",
    "san",
    "swin",
    "vit",
]
