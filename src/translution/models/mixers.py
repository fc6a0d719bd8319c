"""The names of token mixers: those of this library, and those that a program registers."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..utils.words import MIXER_TITLES

__all__ = [
    "GEOMETRY",
    "IMAGE_MIXERS",
    "MIXERS",
    "TABLE_MIXERS",
    "OwnMixer",
    "for_each_mixer",
    "mixer_names",
    "own_mixer",
    "register_mixer",
    "takes_prefix",
]

MIXERS = ("attention", "rotary", "bias", "convolution", "acmix", "translution", "alpha")
"""The names of this library's token mixers. "rotary" and "bias" are attention with that kind of
position."""

IMAGE_MIXERS = ("convolution", "acmix")
"""The mixers that cannot be causal, and so mix images only."""

TABLE_MIXERS = ("translution", "alpha")
"""The mixers with projections that depend on the offset."""

GEOMETRY = ("window", "dilation", "buckets")
"""The options of `Mixing` that belong to a `Layout`."""

PASSED = (
    "dim", "grid", "heads", "head_dim", "causal", "prefix", "prefix_queries", "dropout", *GEOMETRY
)  # fmt: skip
"""What a model passes to the function that makes a mixer."""

DEFAULTS = {"dropout": 0.0, "window": None, "dilation": 1, "buckets": None}
"""The defaults of those that are options of a model."""


@dataclass(frozen=True)
class OwnMixer:
    """A mixer that is not one of this library, as `register_mixer` describes it."""

    name: str
    make: Callable[..., nn.Module]
    causal: bool
    learned_positions: bool

    def takes(self, name: str) -> bool:
        """Whether the function takes what a model passes by this name."""
        parameters = _parameters(self.make)
        return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Check the mixer's own options.

        Raises:
            ValueError: an option that the function does not take or that a model passes itself, or
                one that is missing.
        """
        parameters = _parameters(self.make).values()
        own = [p for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in PASSED]
        for name in options:
            if name in PASSED:
                raise ValueError(f"mixer_options: got {name!r}, which the model passes itself")
            if not self.takes(name):
                raise ValueError(
                    f"mixer_options: got {name!r}, but the mixer {self.name!r} has the options "
                    f"{[p.name for p in own]}"
                )
        missing = [p.name for p in own if p.default is p.empty and p.name not in options]
        if missing:
            raise ValueError(
                f"mixer_options: got {sorted(options)}, but the mixer {self.name!r} needs {missing}"
            )

    def build(self, passed: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
        """Make a module with what the model passes, as far as the function takes it, and with the
        mixer's own options.

        Raises:
            ValueError: the result is not a module.
        """
        taken = {name: value for name, value in passed.items() if self.takes(name)}
        made = self.make(**taken, **options)
        if not isinstance(made, nn.Module):
            raise ValueError(
                f"mixer: the function of {self.name!r} returned {type(made).__name__}, want a "
                "torch.nn.Module"
            )
        return made


_OWN: dict[str, OwnMixer] = {}
_LISTENERS: list[Callable[[str], None]] = []


def register_mixer(
    name: str,
    make: Callable[..., nn.Module],
    causal: bool | None = None,
    learned_positions: bool = False,
    title: str | None = None,
) -> None:
    """Let `vit`, `gpt` and everything that takes the name of a mixer know one of your own.

    A model calls `make` once for each block, with named arguments. Of dim, grid, heads, head_dim,
    causal, prefix, prefix_queries, dropout, window, dilation and buckets it passes those that
    `make` takes, or all if `make` has `**options`; `mixer_options` of the model follow. The module
    maps tokens [batch, tokens, dim] to tokens: `forward(x, grid)`, where `grid` has the tokens per
    axis.

    - Without `prefix` a ViT has no class token, and the logits come from the mean of all tokens.
    - A mixer that does not take `window`, `dilation` or `buckets` refuses these options.
    - A causal mixer with the methods that `SelfAttention` has for caches generates with them.

    Models get names, too, such as "mine_vit_tiny_patch16_224" for a mixer "mine".

    Args:
        name: letters, digits and underscores.
        make: a function or class that returns the module of a block.
        causal: whether the mixer can be causal, so that a GPT may use it. It is then made with
            causal=True if `make` takes that. None stands for whether `make` names an argument
            `causal`.
        learned_positions: whether models with this mixer add learned absolute positions to their
            tokens by default.
        title: what tables and figures call it; the default is the name.

    Raises:
        ValueError: the name is not one or belongs to another mixer, the title belongs to another,
            or `make` cannot be called as described. The same function may register again.
    """
    earlier = _OWN.get(name)
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ValueError(f"name: got {name!r}, want letters, digits and underscores")
    if name in MIXERS or (earlier is not None and _origin(earlier.make) != _origin(make)):
        raise ValueError(f"name: {name!r} is registered already")
    if title is not None and MIXER_TITLES.get(name) != title and title in MIXER_TITLES.values():
        raise ValueError(f"title: another mixer is called {title!r}")
    parameters = _parameters(make)
    for parameter in parameters.values():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ValueError(f"make: takes {parameter.name!r} by position only, want it by name")
        default = DEFAULTS.get(parameter.name, parameter.empty)
        if parameter.default not in (parameter.empty, default) and default is not parameter.empty:
            raise ValueError(
                f"make: has the default {parameter.default!r} for {parameter.name}, but models "
                f"pass theirs, which is {default!r}; want that or another name"
            )
    causal = "causal" in parameters if causal is None else causal
    _OWN[name] = OwnMixer(name, make, causal, learned_positions)
    if title is not None:
        MIXER_TITLES[name] = title
    if earlier is None:
        for listener in _LISTENERS:
            listener(name)


def own_mixer(name: str) -> OwnMixer | None:
    """The mixer that was registered by this name; None for those of this library."""
    return _OWN.get(name)


def mixer_names(causal: bool = False) -> list[str]:
    """The names of all mixers, or of those that can be causal."""
    names = [name for name in MIXERS if not (causal and name in IMAGE_MIXERS)]
    return names + [own.name for own in _OWN.values() if own.causal or not causal]


def takes_prefix(mixer: str) -> bool:
    """Whether a mixer takes prefix tokens, such as a class token."""
    own = own_mixer(mixer)
    return mixer != "convolution" if own is None else own.takes("prefix")


def for_each_mixer(listener: Callable[[str], None]) -> None:
    """Call a function with the name of each mixer, and later with those that are registered."""
    for name in mixer_names():
        listener(name)
    _LISTENERS.append(listener)


def _parameters(make: Callable[..., nn.Module]) -> dict[str, inspect.Parameter]:
    """The parameters of a function or class that have names."""
    found = inspect.signature(make).parameters.values()
    return {p.name: p for p in found if p.kind is not p.VAR_POSITIONAL}


def _origin(make: Callable[..., nn.Module]) -> tuple[str, str]:
    """Where a function comes from: it is the same one after its file or cell has run again."""
    module = getattr(make, "__module__", "")
    file = getattr(sys.modules.get(module), "__file__", None)
    return file or module, getattr(make, "__qualname__", repr(make))
