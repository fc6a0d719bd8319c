"""Models by name."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import typing
from collections.abc import Callable
from typing import Any

from torch import nn

from .blocks import IMAGE_MIXERS, MIXERS, SIZES
from .gpt import GPTConfig, gpt
from .pvt import PVTS, PVTConfig, pvt
from .resnet import RESNETS, ResNetConfig, resnet
from .san import SANS, SANConfig, san
from .swin import SWINS, SwinConfig, swin
from .vit import ViTConfig, vit

__all__ = ["FAMILIES", "create_model", "list_models", "model_options", "register_model"]

# A family is a name of its own; its configuration says which options there are.
FAMILIES: dict[str, tuple[Callable[..., nn.Module], type]] = {
    "vit": (vit, ViTConfig),
    "gpt": (gpt, GPTConfig),
    "resnet": (resnet, ResNetConfig),
    "san": (san, SANConfig),
    "pvt": (pvt, PVTConfig),
    "swin": (swin, SwinConfig),
}

_MODELS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {}


def register_model(name: str, make: Callable[..., nn.Module], **keywords: Any) -> None:
    """Let `create_model(name)` call `make(**keywords)`.

    Raises:
        ValueError: a name that is registered already.
    """
    if name in _MODELS:
        raise ValueError(f"name: {name!r} is registered already")
    _MODELS[name] = (make, keywords)


def create_model(name: str, **overrides: Any) -> nn.Module:
    """The model of this name, with any of its options changed.

    Args:
        name: one of `list_models`.
        overrides: options of its configuration, such as num_classes; `model_options` has them.

    Raises:
        ValueError: an unknown name (it lists the close ones), or options that don't fit.
    """
    make, keywords = _find(name)
    return make(**(keywords | overrides))


def model_options(name: str) -> dict[str, Any]:
    """The options of the model of this name, and their types.

    Raises:
        ValueError: an unknown name.
    """
    make, _ = _find(name)
    kinds = dict(FAMILIES.values())
    configured = typing.get_type_hints(kinds[make]) if make in kinds else {}
    hints = typing.get_type_hints(make)
    own = {
        parameter.name: hints.get(parameter.name, Any)
        for parameter in inspect.signature(make).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    return own | {option: hint for option, hint in configured.items() if option not in own}


def _find(name: str) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    if name not in _MODELS:
        close = difflib.get_close_matches(name, _MODELS, n=5, cutoff=0.5)
        hint = f"did you mean {close}" if close else "list_models() has them all"
        raise ValueError(f"name: there is no model {name!r}; {hint}")
    return _MODELS[name]


def list_models(pattern: str = "*") -> list[str]:
    """The names that match a shell pattern such as "alpha_*", sorted."""
    return sorted(fnmatch.filter(_MODELS, pattern))


for _family, (_make, _) in FAMILIES.items():
    register_model(_family, _make)
for _mixer in MIXERS:
    for _size in SIZES:
        for _patch in (16, 32, 56):
            register_model(
                f"{_mixer}_vit_{_size}_patch{_patch}_224", vit,
                size=_size, mixer=_mixer, image_size=224, patch_size=_patch,
            )  # fmt: skip
        if _mixer not in IMAGE_MIXERS:
            register_model(f"{_mixer}_gpt_{_size}", gpt, size=_size, mixer=_mixer, context=1024)
# The backbones of ACmix, and their parents with what ACmix replaces in them.
_BACKBONES: dict[str, tuple[Callable[..., nn.Module], list[str], str]] = {
    "resnet{}": (resnet, list(RESNETS), "convolution"),
    "san{}": (san, list(SANS), "attention"),
    "pvt_{}": (pvt, list(PVTS), "attention"),
    "swin_{}": (swin, list(SWINS), "attention"),
}
for _name, (_make, _sizes, _parent) in _BACKBONES.items():
    for _size in _sizes:
        register_model(_name.format(_size), _make, size=_size, mixer=_parent)
        register_model("acmix_" + _name.format(_size), _make, size=_size, mixer="acmix")
