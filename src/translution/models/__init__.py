"""Models made of the modules: one file per family, which reads from top to bottom."""

from .backbone import Backbone
from .inspection import attention_weights
from .language_model import GPT, GPTConfig, gpt
from .mixers import register_mixer
from .pretrained import Pretrained
from .pyramid_transformer import PVT, PVTConfig, pvt
from .registry import create_model, list_models, model_options, register_model
from .residual_network import ResNet, ResNetConfig, resnet
from .self_attention_network import SAN, SANConfig, san
from .swin_transformer import Swin, SwinConfig, swin
from .vision_transformer import ViT, ViTConfig, vit

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
    "register_mixer",
    "register_model",
    "resnet",
    "san",
    "swin",
    "vit",
]
