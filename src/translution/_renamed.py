"""Argument names of earlier versions, which keep working.

A class that is decorated with `renamed_arguments` takes its old argument names too, each with a
DeprecationWarning that names the new one. Saved configurations with old names are read the same
way, without a warning. docs/upgrading-to-0.1.md lists all of them.

Names that other libraries have for an argument do not work. Where `foreign_arguments` lists them,
the error says which argument it is here.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

__all__ = ["current_arguments", "foreign_arguments", "renamed_arguments"]

New = str | Callable[[Any, dict[str, Any]], dict[str, Any]]
"""The new name of an argument; or a function from the old argument's value, and all arguments that
came with it, to the new arguments."""

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])


def renamed_arguments(**renamed: New) -> Callable[[C], C]:
    """A class decorator: let the constructor take arguments by their old names, old=new."""

    def decorate(cls: C) -> C:
        constructor = cls.__init__
        cls._renamed = getattr(cls, "_renamed", {}) | renamed  # type: ignore[attr-defined]

        @functools.wraps(constructor)
        def __init__(self: Any, *args: Any, **given: Any) -> None:
            if not given.keys().isdisjoint(cls._renamed):  # type: ignore[attr-defined]
                given = current_arguments(cls, given, stacklevel=3)
            constructor(self, *args, **given)

        cls.__init__ = __init__
        return cls

    return decorate


def current_arguments(
    cls: type, given: dict[str, Any], warn: bool = True, stacklevel: int = 2
) -> dict[str, Any]:
    """`given` with every old argument name of `cls` replaced by the current one.

    Args:
        cls: a class with `renamed_arguments`, or any other, whose arguments stay as they are.
        given: arguments by name.
        warn: whether each old name gives a DeprecationWarning.
        stacklevel: of the warning, as in `warnings.warn`.

    Raises:
        ValueError: an argument is given by its old and by its new name.
    """
    renamed: dict[str, New] = getattr(cls, "_renamed", {})
    current = {name: value for name, value in given.items() if name not in renamed}
    for old in [name for name in given if name in renamed]:
        new = renamed[old]
        now = {new: given[old]} if isinstance(new, str) else new(given[old], given)
        for name, value in now.items():
            if name in current:
                raise ValueError(f"{old}: is the old name of {name}, which is given as well")
            current[name] = value
        if warn:
            hint = ", ".join(
                now if isinstance(new, str) else (f"{k}={v!r}" for k, v in now.items())
            )
            warnings.warn(
                f"{cls.__name__}: the argument {old} is now {hint}",
                DeprecationWarning,
                stacklevel=stacklevel + 1,
            )
    return current


def foreign_arguments(**ours: str) -> Callable[[F], F]:
    """A decorator for a class or a function: an argument by another library's name is a TypeError.

    Args:
        ours: for each such name, what to give instead; the message ends with it.
    """

    def decorate(target: F) -> F:
        call: Any = target.__init__ if isinstance(target, type) else target

        @functools.wraps(call)
        def checked(*args: Any, **given: Any) -> Any:
            for name in given:
                if name in ours:
                    owner = type(args[0]) if isinstance(target, type) else target
                    raise TypeError(f"{owner.__name__}: got {name}, want {ours[name]}")
            return call(*args, **given)

        if not isinstance(target, type):
            return cast(F, checked)
        target.__init__ = checked
        return target

    return decorate
