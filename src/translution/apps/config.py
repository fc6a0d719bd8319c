"""Configurations from YAML and the command line. An error names the key, the file and what is
allowed."""

from __future__ import annotations

import copy
import difflib
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ..utils.words import shortened

__all__ = ["Options", "as_yaml", "load", "parse", "read"]

O = TypeVar("O", bound="Options")  # noqa: E741


class Options(BaseModel):
    """A part of a configuration. It is typed, has no unknown keys and cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


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
    content = _yaml(Path(path).read_text("utf-8"), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}, want keys and values")
    return content


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
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not YAML: {' '.join(str(error).split())}") from None


def _put(content: dict[str, Any], keys: list[str], value: Any, where: str) -> None:
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
        message = f"got {error['input']!r}, {message[0].lower()}{message[1:]}"
    where = "command line" if any(key == g or g.startswith(f"{key}.") for g in given) else source
    return f"{where}: {key}: {message}" if key else f"{where}: {message}"


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
    """A SafeLoader that refuses a key that is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {key!r} is there twice")
        return super().construct_mapping(node, deep)
