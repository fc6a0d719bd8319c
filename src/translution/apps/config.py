"""Configuration: typed and validated; an error names the key, the file and what is allowed."""

from __future__ import annotations

import copy
import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ..utils.words import some

__all__ = ["Options", "as_yaml", "load", "parse", "read"]

O = TypeVar("O", bound="Options")  # noqa: E741


class Options(BaseModel):
    """A part of a configuration: typed, without unknown keys, unchanging once made."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def load(kind: type[O], path: Path | str, changes: Sequence[str] = ()) -> O:
    """The configuration in a YAML file, with changes such as "train.steps=100" from a command line.

    Raises:
        ValueError: naming the file (or the command line), the key, what came and what is allowed.
        OSError: a file that cannot be read.
    """
    return parse(kind, read(path), str(path), changes)


def read(path: Path | str) -> dict[str, Any]:
    """The content of a YAML file, as it stands there.

    Raises:
        ValueError: naming the file: not YAML, or not keys and values.
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
    """The configuration in a dict that came from `source`, with changes as above, or with such as
    {"train.steps": 100} that come from there too."""
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
        told = [_tell(kind, one, source, given) for one in wrong]
        raise ValueError(some(told, "\n")) from None


def as_yaml(options: Options) -> str:
    """All of it, defaults included."""
    return yaml.safe_dump(options.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not YAML: {' '.join(str(error).split())}") from None


def _put(content: dict[str, Any], keys: list[str], value: Any, told: str) -> None:
    for key in keys[:-1]:
        if content.get(key) is None:
            content[key] = {}
        content = content[key]
        if not isinstance(content, dict):
            raise ValueError(f"{told} goes into {key!r}, which is a value")
    content[keys[-1]] = value


def _tell(kind: type[Options], error: Any, source: str, given: set[str]) -> str:
    """One line for one error of pydantic's."""
    path, owner = _walk(kind, error["loc"])
    key = ".".join(path)
    said = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        known = list(owner.model_fields)
        close = difflib.get_close_matches(path[-1], known, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        said = f"there is no such key{meant}; allowed are {', '.join(known)}"
    elif error["type"] == "missing":
        said = "is missing"
    elif error["type"] != "value_error" and not error["type"].startswith("union_tag"):
        said = f"got {error['input']!r}, {said[0].lower()}{said[1:]}"
    where = "command line" if any(key == g or g.startswith(f"{key}.") for g in given) else source
    return f"{where}: {key}: {said}" if key else f"{where}: {said}"


def _walk(kind: type[BaseModel], loc: Sequence[int | str]) -> tuple[list[str], type[BaseModel]]:
    """The keys as a file has them (pydantic's path has the kind of a union too), and what owns
    the last one."""
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
    """The models that a type may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


class _Loader(yaml.SafeLoader):
    """SafeLoader, but a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {key!r} is there twice")
        return super().construct_mapping(node, deep)
