"""Attention with a sense of where: Translution, α-Translution and their relatives.

Names are imported when they are first used, so that what needs no torch (the help of the command
line) does not wait for it.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from . import _moved
from ._version import __version__ as __version__

if TYPE_CHECKING:
    from . import functional
    from .interop.conversion import (
        convert,
        load_converted,
        make_relative,
        make_shared,
        patch_grid,
        resize_offsets,
        save_converted,
    )
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
        register_mixer,
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
    "load_converted",
    "load_published",
    "make_relative",
    "make_shared",
    "patch_grid",
    "register_mixer",
    "register_model",
    "resize_offsets",
    "save_converted",
    "vit",
]

_ELSEWHERE = {
    "Layout": "layouts",
    **dict.fromkeys(
        ["convert", "load_converted", "make_relative", "make_shared", "patch_grid",
         "resize_offsets", "save_converted"],
        "interop.conversion",
    ),
    **dict.fromkeys(["export_published", "load_published"], "interop.published"),
    **dict.fromkeys(
        ["GPT", "GPTConfig", "ViT", "ViTConfig", "attention_weights", "create_model", "gpt",
         "list_models", "register_mixer", "register_model", "vit"],
        "models",
    ),
}  # fmt: skip
"""The modules that public names come from; the other names are those of `modules`."""

# those that were submodules as soon as the package was imported
_SUBMODULES = ("backends", "caches", "functional", "interop", "layouts", "models", "modules",
               "neighborhoods", "utils")  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_ELSEWHERE.get(name, 'modules')}", __name__)
    found = globals()[name] = getattr(module, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


_moved.install()
if "torch" in sys.modules:
    # who has imported torch does not wait for it; and a program that torch.export has saved finds
    # the operators registered
    importlib.import_module(".functional", __name__)
