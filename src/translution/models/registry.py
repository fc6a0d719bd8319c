"""Models by name. Each model's file registers its own names here when it is imported."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import typing
from collections.abc import Callable
from typing import Any

from torch import nn

from .._renamed import current_arguments

__all__ = [
    "create_model",
    "current_options",
    "families",
    "list_models",
    "model_options",
    "register_family",
    "register_model",
]

_MODELS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {}
_FAMILIES: dict[str, tuple[Callable[..., nn.Module], type]] = {}


def register_model(name: str, make: Callable[..., nn.Module], **options: Any) -> None:
    """Let `create_model(name)` call `make(**options)`.

    Raises:
        ValueError: the name is registered already.
    """
    if name in _MODELS:
        raise ValueError(f"name: {name!r} is registered already")
    _MODELS[name] = (make, options)


def register_family(name: str, make: Callable[..., nn.Module], config: type) -> None:
    """Register a family of models: a name of its own, and the class of its configurations.

    Raises:
        ValueError: the name is registered already.
    """
    register_model(name, make)
    _FAMILIES[name] = (make, config)


def families() -> dict[str, type]:
    """The class of the configuration of each family, by the family's name."""
    return {name: config for name, (_, config) in _FAMILIES.items()}


def create_model(name: str, **overrides: Any) -> nn.Module:
    """The model of this name, with any of its options changed.

    Args:
        name: one of `list_models`.
        overrides: options of its configuration, such as num_classes; `model_options` lists them.

    Raises:
        ValueError: an unknown name (the message lists similar ones), or options that do not fit.
    """
    make, options = _find(name)
    return make(**(options | overrides))


def model_options(name: str) -> dict[str, Any]:
    """The options of the model of this name, and their types.

    Raises:
        ValueError: an unknown name.
    """
    make, _ = _find(name)
    config_of_maker = dict(_FAMILIES.values())
    config = config_of_maker.get(make)
    configured = {} if config is None else typing.get_type_hints(config)
    hints = typing.get_type_hints(make)
    own = {
        parameter.name: hints.get(parameter.name, Any)
        for parameter in inspect.signature(make).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    return own | {option: hint for option, hint in configured.items() if option not in own}


def current_options(name: str, options: dict[str, Any], saved: bool = False) -> dict[str, Any]:
    """Options of the model of this name, with option names of earlier versions replaced.

    Args:
        name: one of `list_models`.
        options: by name.
        saved: whether they come from a file. Earlier names then give no DeprecationWarning, and
            options that earlier versions stored although the model does not use them are left out.

    Raises:
        ValueError: an unknown model, or an option that is given by both of its names.
    """
    make, _ = _find(name)
    config_of_maker: dict[Any, Any] = dict(_FAMILIES.values())
    config = config_of_maker.get(make)
    if config is None:
        return options
    options = current_arguments(config, options, warn=not saved, stacklevel=3)
    return (
        config.without_unused(options) if saved and hasattr(config, "without_unused") else options
    )


def list_models(pattern: str = "*") -> list[str]:
    """The names that match a shell pattern such as "alpha_*", sorted."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def _find(name: str) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    if name not in _MODELS:
        close = difflib.get_close_matches(name, _MODELS, n=5, cutoff=0.5)
        hint = f"did you mean {close}" if close else "list_models() has them all"
        raise ValueError(
            f"name: there is no model {name!r}; {hint}; a model of your own must be registered "
            "first, on the command line by --import FILE"
        )
    return _MODELS[name]
