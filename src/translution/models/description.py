"""The description of a saved model: a JSON file beside the weights.

All folders with weights use one schema, which is `Description`. The name of the file says what the
folder is:

    config.json        a model that `save_pretrained` wrote
    checkpoint.json    a checkpoint of a training run
    division.json      a model whose tables were divided over processes

Files of earlier versions are read too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._version import __version__

__all__ = [
    "CHECKPOINT",
    "CONFIG",
    "DIVISION",
    "FORMAT",
    "Description",
    "check_file",
    "description_file",
    "fits",
    "read_description",
    "write_description",
]

CONFIG, CHECKPOINT, DIVISION = "config.json", "checkpoint.json", "division.json"
FORMAT = "translution-checkpoint-2"
# Formats of earlier versions. `_current` reads them.
EARLIER = {
    CONFIG: "translution-model-1",
    CHECKPOINT: "translution-checkpoint-1",
    DIVISION: "translution-division-1",  # such a file did not name its format
}
# Models whose default mixer was ACmix in earlier formats, and is that of their parent now.
ONCE_ACMIX = ("resnet", "swin", "san", "pvt")
# The keys that must be there, by the name of the file. All others have defaults.
REQUIRED = {
    CONFIG: ("architecture", "options"),
    CHECKPOINT: ("architecture", "options", "config", "classes", "step", "metrics"),
    DIVISION: ("shares", "tables", "optimizer"),
}
# What JSON files call these types.
JSON_WORDS: dict[Any, str] = {
    dict: "a dict", list: "a list", tuple: "a list", str: "a string", int: "a whole number",
    float: "a number", bool: "true or false",
}  # fmt: skip


@dataclass(frozen=True)
class Description:
    """What a folder with weights contains.

    Attributes:
        architecture: the name of the model in the registry; None for a model that is not of this
            library.
        options: the options from which the model is built.
        classes: the names of the classes in the order of the logits, for a classifier.
        preprocessing: how an image becomes the input of the model (`Preprocessing.entry`).
        model_type: the name of the kind of model in transformers.
        config: the configuration of the training run, with the options of the data.
        step: the number of steps that the model was trained for.
        metrics: those of the last validation before the model was saved.
        tied: groups of names of parameters that are one and the same parameter.
        shares: the number of files that the rows of tables are divided over.
        tables: the number of rows of each divided table.
        optimizer: the settings and states of the optimizer that are not tensors.
        files: the SHA-256 of each other file of the folder, by its name.
        translution: the version of the library that wrote the folder.
    """

    architecture: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    classes: list[str] | None = None
    preprocessing: dict[str, Any] | None = None
    model_type: str | None = None
    config: dict[str, Any] | None = None
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    tied: list[list[str]] = field(default_factory=list)
    shares: int | None = None
    tables: dict[str, int] = field(default_factory=dict)
    optimizer: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)
    translution: str = __version__


def description_file(folder: Path) -> Path:
    """The file of a folder's description. Without one, it is the one that a checkpoint lacks."""
    return next((folder / n for n in REQUIRED if (folder / n).is_file()), folder / CHECKPOINT)


def read_description(folder: Path) -> Description:
    """Read the description of a folder.

    Raises:
        ValueError: there is none, it was written by something else or by a newer version of this
            library, or a key is missing or has a value of another type. The message names the file
            and the key.
        OSError: the file cannot be read.
    """
    path = description_file(folder)
    if not path.is_file():
        raise ValueError(f"{path}: is missing, and so are {CONFIG} and {DIVISION}")
    try:
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"got {type(content).__name__}, want keys and values")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a translution model ({error})") from None
    name = path.name
    format_name = content.get("format", EARLIER[name] if name == DIVISION else None)
    if not isinstance(format_name, str):
        raise ValueError(f"{path}: not a translution model (format: got {format_name!r})")
    if format_name not in (FORMAT, EARLIER[name]):
        raise ValueError(
            f"{path}: format {format_name!r}, want {FORMAT!r}; a newer version of translution may "
            "be able to read it"
        )
    content = _current(content, format_name, path)
    hints = typing.get_type_hints(Description)
    for key in REQUIRED[name]:
        if key not in content:
            raise ValueError(f"{path}: {key}: is missing, want {_words(hints[key])}")
    given = {key: content[key] for key in hints if key in content}
    for key, value in given.items():
        if not fits(value, hints[key]):
            raise ValueError(f"{path}: {key}: got {_short(value)}, want {_words(hints[key])}")
    if name != DIVISION and given["architecture"] is None:
        raise ValueError(f"{path}: architecture: got None, want the name of a model")
    least = {"step": 0, "shares": 1}
    for key, smallest in least.items():
        if given.get(key) is not None and given[key] < smallest:
            raise ValueError(f"{path}: {key}: got {given[key]}, want at least {smallest}")
    return Description(**given)


def write_description(
    folder: Path, name: str, description: Description, files: Iterable[str]
) -> None:
    """Write the description of a folder whose other files are complete.

    Args:
        folder: the folder.
        name: the name of the file, `CONFIG`, `CHECKPOINT` or `DIVISION`.
        description: what is described. Its `files` are computed.
        files: the names of the files in the folder whose SHA-256 is stored.
    """
    hashes = {file: _hash(folder / file) for file in sorted(files)}
    values = dataclasses.asdict(dataclasses.replace(description, files=hashes))
    defaults = dataclasses.asdict(Description())
    content = {"format": FORMAT, "translution": values.pop("translution")}
    content |= {
        key: value
        for key, value in values.items()
        if key in REQUIRED[name] or value != defaults[key]
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (folder / name).write_text(text, "utf-8")


def check_file(folder: Path, name: str, description: Description) -> None:
    """Check that a file exists, and that it is the one that was described.

    Files of earlier versions have no SHA-256 in their description and are not compared.

    Raises:
        ValueError: the file is missing or has changed.
    """
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{path}: is missing")
    want = description.files.get(name)
    if want is not None and _hash(path) != want:
        raise ValueError(
            f"{path}: was changed or damaged after it was written: its SHA-256 is not the one in "
            "the description beside it"
        )


def fits(value: Any, hint: Any) -> bool:
    """Whether a value that was read from JSON has a type.

    A list can stand for a tuple, and an int for a float, but a bool is not a number.
    """
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inside)
    if origin is typing.Literal:
        return value in inside
    if origin is dict:
        return isinstance(value, dict) and all(fits(one, inside[1]) for one in value.values())
    if origin is tuple and inside[-1] is not ...:
        return (
            isinstance(value, list | tuple)
            and len(value) == len(inside)
            and all(map(fits, value, inside))
        )
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, list | tuple) and all(fits(one, inside[0]) for one in value)
    if hint is float:
        hint = int | float
    if hint in (int, int | float) and isinstance(value, bool):
        return False
    return isinstance(value, hint) if isinstance(hint, type | types.UnionType) else True


def _current(content: dict[str, Any], format_name: str, path: Path) -> dict[str, Any]:
    """The content of a description of an earlier version, with the present keys."""
    if format_name == FORMAT:
        return content
    if format_name == EARLIER[CHECKPOINT]:
        content = _with_architecture(content, path)
    options = content.get("options")
    if content.get("architecture") in ONCE_ACMIX and isinstance(options, dict):
        content = content | {"options": {"mixer": "acmix"} | options}
    return content


def _with_architecture(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The content of an earlier checkpoint, whose key `model` had the name and the options."""
    model = content.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"{path}: model: got {_short(model)}, want a dict of name and options")
    for key, kind in (("name", str), ("options", dict)):
        if not isinstance(model.get(key), kind):
            raise ValueError(
                f"{path}: model.{key}: got {_short(model.get(key))}, want a {kind.__name__}"
            )
    return content | {"architecture": model["name"], "options": model["options"]}


def _hash(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            found.update(part)
    return found.hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _words(hint: Any) -> str:
    """The type of a key as an error says it, such as "a dict"; that it may be None is left out."""
    members = [each for each in typing.get_args(hint) if each is not type(None)]
    if isinstance(hint, types.UnionType):
        return " or ".join(_words(each) for each in members)
    kind: Any = typing.get_origin(hint) or hint
    return JSON_WORDS.get(kind, getattr(kind, "__name__", str(kind)))
