"""Configurations from YAML and the command line. An error names the key, the file and what is
allowed."""

from __future__ import annotations

import copy
import difflib
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..utils.words import shortened

__all__ = ["Options", "as_yaml", "load", "parse", "read"]

O = TypeVar("O", bound="Options")  # noqa: E741

MOST = 10_000_000  # bytes of a file, and characters of all its values
DEPTH = 50  # levels of keys and values
DIGITS = 40  # of an integer

Count = Annotated[int, Field(ge=1, le=10**12)]
"""A number of things, which is small enough to count up to in any integer type."""

Seed = Annotated[int, Field(ge=0, lt=2**64)]
"""A seed that torch accepts."""

Place = Annotated[str, Field(min_length=1)]
"""A file, folder or name. An empty one would stand for the working directory."""


class Options(BaseModel):
    """A part of a configuration. It is typed, has no unknown keys and cannot be changed. Its
    numbers are finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


def load(kind: type[O], path: Path | str, changes: Sequence[str] = ()) -> O:
    """Read a configuration from a YAML file.

    Args:
        kind: the class of the configuration.
        path: the file.
        changes: changes from a command line, such as "train.steps=100".

    Raises:
        ValueError: a wrong configuration. The message names the file or the command line, the key,
            the value and what is allowed.
        OSError: a file that cannot be read.
    """
    return parse(kind, read(path), str(path), changes)


def read(path: Path | str) -> dict[str, Any]:
    """Read the keys and values of a YAML file, without checking them.

    Raises:
        ValueError: a file that is not YAML, or has no keys.
        OSError: a file that cannot be read.
    """
    content = _yaml(read_text(path), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}, want keys and values")
    return content


def read_text(path: Path | str) -> str:
    """Read a small text file.

    Raises:
        ValueError: a pipe or a device, a large file, or one that is not UTF-8.
        OSError: a file that cannot be read.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: got a folder, a pipe or a device, want a file")
    with path.open("rb") as file:
        content = file.read(MOST + 1)
    if len(content) > MOST:
        raise ValueError(f"{path}: got more than {MOST:,} bytes, want a file of text")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise ValueError(
            f"{path}: not UTF-8: byte 0x{byte:02x} at position {error.start}"
        ) from None


def shown(value: object, most: int = 200) -> str:
    """A value for a message: in one line, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


def parse(
    kind: type[O],
    content: dict[str, Any],
    source: str,
    changes: Sequence[str] | Mapping[str, Any] = (),
) -> O:
    """Make a configuration from keys and values.

    Args:
        kind: the class of the configuration.
        content: the keys and values; they are not changed.
        source: where they come from, for messages.
        changes: either texts from a command line, such as "train.steps=100", or a mapping that
            comes from `source` too, such as {"train.steps": 100}.

    Raises:
        ValueError: a wrong configuration. The message names the source or the command line, the
            key, the value and what is allowed.
    """
    content, given = copy.deepcopy(content), set()
    if isinstance(changes, Mapping):
        for key, value in changes.items():
            _put(content, key.split("."), copy.deepcopy(value), f"{source}: {key!r}")
        changes = ()
    for change in changes:
        key, equals, text = str(change).removeprefix("--").partition("=")
        if not equals or not key:
            raise ValueError(f"command line: got {change!r}, want --key=value such as --seed=1")
        where = f"command line: {change!r}"
        _put(content, key.split("."), _yaml(text, f"command line: {key}"), where)
        given.add(key)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        wrong = error.errors()
        messages = [_message(kind, one, source, given) for one in wrong]
        raise ValueError(shortened(messages, "\n")) from None


def as_yaml(options: Options, **replaced: Any) -> str:
    """A configuration as YAML, with its defaults. `replaced` gives other values for some keys."""
    content = json.loads(json.dumps(options.model_dump(mode="json") | replaced))  # no tuples
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _yaml(text: str, source: str) -> Any:
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{source}: {TOO_DEEP}") from None
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        # PyYAML raises them for values that do not fit their tag, such as a date 2026-99-99
        raise ValueError(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    size, _ = _measure(value, source, {})
    if size > MOST:
        raise ValueError(
            f"{source}: got {size:,} characters with its aliases, want at most {MOST:,}"
        )
    return value


TOO_DEEP = f"got values within values without end, want at most {DEPTH} levels"


def _measure(value: Any, source: str, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """The number of characters of a value, and its levels. A value that aliases repeat is measured
    once and counted each time.

    Raises:
        ValueError: too many levels, or a value that contains itself.
    """
    if not isinstance(value, dict | list | tuple | set):
        return (len(value) if isinstance(value, str | bytes) else 1), 0
    if id(value) not in known:
        known[id(value)] = (0, DEPTH)  # what a value has that contains itself
        parts = [*value, *value.values()] if isinstance(value, dict) else list(value)
        measured = [_measure(part, source, known) for part in parts]
        levels = 1 + max((levels for _, levels in measured), default=0)
        if levels > DEPTH:
            raise ValueError(f"{source}: {TOO_DEEP}")
        known[id(value)] = (1 + sum(size for size, _ in measured), levels)
    return known[id(value)]


def _put(content: dict[str, Any], keys: list[str], value: Any, where: str) -> None:
    if len(keys) > DEPTH:
        raise ValueError(f"{where[:100]}…: {TOO_DEEP}")
    for key in keys[:-1]:
        if content.get(key) is None:
            content[key] = {}
        content = content[key]
        if not isinstance(content, dict):
            raise ValueError(f"{where} goes into {key!r}, which is a value")
    content[keys[-1]] = value


def _message(kind: type[Options], error: Any, source: str, given: set[str]) -> str:
    """One line for one error of pydantic."""
    path, owner = _walk(kind, error["loc"])
    key = ".".join(path)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        known = list(owner.model_fields)
        close = difflib.get_close_matches(path[-1], known, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        message = f"there is no such key{meant}; allowed are {', '.join(known)}"
    elif error["type"] == "missing":
        message = "is missing"
    elif error["type"] != "value_error" and not error["type"].startswith("union_tag"):
        message = f"got {shown(error['input'])}, {message[0].lower()}{message[1:]}"
    where = (
        "command line"
        if any(f"{key}.".startswith(f"{g}.") or g.startswith(f"{key}.") for g in given)
        else source
    )
    line = f"{where}: {key}: {message}" if key else f"{where}: {message}"
    return " ".join(line.split())


def _walk(kind: type[BaseModel], loc: Sequence[int | str]) -> tuple[list[str], type[BaseModel]]:
    """The path of keys in a file, and the class that the last key belongs to.

    A path of pydantic also contains the `kind` of each union, which a file does not.
    """
    path, models, owner = list[str](), [kind], kind
    for step in loc:
        if len(models) > 1 and (of := [m for m in models if step in _kinds(m)]):
            models = of
            continue
        path.append(str(step))
        owner = next((m for m in models if step in m.model_fields), models[0] if models else owner)
        field = owner.model_fields.get(str(step))
        models = _models(field.annotation) if field else []
    return path, owner


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("kind")
    return typing.get_args(field.annotation) if field else ()


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The configuration classes that a type allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses a key that is given twice, and integers of many digits."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {key!r} is there twice")
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > DIGITS:
            line, digits = node.start_mark.line + 1, len(node.value)
            raise yaml.YAMLError(f"line {line}: got an integer of {digits:,} digits")
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
