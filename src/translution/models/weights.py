"""Weights in files: writing, reading, and building the model that they belong to.

Nothing is unpickled. The sizes in a description are compared with the shapes in the files before
anything of these sizes is allocated.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..utils.words import shortened
from .description import DIVISION, Description, check_file, fits, read_description
from .registry import create_model, current_options, model_options

__all__ = [
    "PARTS",
    "SHARED",
    "STATES",
    "WEIGHTS",
    "build",
    "described_model",
    "misfits",
    "needed",
    "not_finite",
    "open_weights",
    "read_shapes",
    "read_weights",
    "same_parameters",
    "save_weights",
    "share_file",
    "tie",
]

M = TypeVar("M", bound=nn.Module)

WEIGHTS = "model.safetensors"
PARTS = "parts"  # a folder instead of WEIGHTS, if tables were divided over processes
SHARED = "shared.safetensors"  # in it, what is the same in all processes
STATES = "optimizer/"  # begins the names of the optimizer's states in files of divided models


def share_file(rank: int, ranks: int) -> str:
    """The name of the file with the rows that a process has of each divided table."""
    return f"share-{rank}-of-{ranks}.safetensors"


# -- files -----------------------------------------------------------------------------------------


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file.

    Raises:
        ValueError: a tensor has values that are not finite; the message names it.
        OSError: the file cannot be written.
        ImportError: safetensors is not installed.
    """
    broken, save_file = needed("safetensors").SafetensorError, needed("safetensors.torch").save_file
    if wrong := not_finite({name: weights[name] for name in filter(_is_weight, weights)}):
        raise ValueError(f"weights: {shortened(wrong)} have values that are not finite")
    seen, written = set[int](), {}
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        # the format stores each tensor by itself
        written[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    try:
        save_file(written, path, metadata={"format": "pt"})
    except broken as error:
        raise OSError(f"{path}: cannot be written: {error}") from None


def not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that have infinite values, or values that are not a number."""
    return [name for name, tensor in weights.items() if not bool(tensor.isfinite().all())]


def read_shapes(folder: Path) -> dict[str, torch.Size]:
    """The shapes of the weights in a folder by name, from the headers of the files.

    Raises:
        ValueError: a file is missing or incomplete.
    """
    if not (folder / PARTS).is_dir() and not (folder / DIVISION).is_file():
        with open_weights(folder / WEIGHTS) as file:
            return _shapes(file)
    folder, description = _divided(folder)
    assert description.shares is not None
    with open_weights(folder / SHARED) as file:
        shapes = _shapes(file)
    with open_weights(folder / share_file(0, description.shares)) as file:
        for name, shape in _shapes(file).items():
            if not _is_weight(name):
                continue
            rows = description.tables.get(name)
            if rows is None:
                raise ValueError(f"{folder / DIVISION}: tables: has no {name!r}, want its rows")
            shapes[name] = torch.Size((rows, *shape[1:]))
    return {name: shape for name, shape in shapes.items() if _is_weight(name)}


def read_weights(folder: Path, description: Description) -> dict[str, Tensor]:
    """Read the weights of a folder: tensors by name, on the CPU. Divided tables are put together.

    Args:
        folder: a folder with the file `WEIGHTS`, or with divided tables.
        description: that of the folder, with the SHA-256 of the file.

    Raises:
        ValueError: a file is missing, incomplete or changed.
    """
    if not (folder / PARTS).is_dir() and description.shares is None:
        check_file(folder, WEIGHTS, description)
        with open_weights(folder / WEIGHTS) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    folder, description = _divided(folder)
    shares = description.shares or 1
    names = [SHARED, *(share_file(rank, shares) for rank in range(shares))]
    with ExitStack() as stack:
        files = []
        for name in names:
            check_file(folder, name, description)
            files.append(stack.enter_context(open_weights(folder / name)))
        weights = {
            name: files[0].get_tensor(name) for name in _shapes(files[0]) if _is_weight(name)
        }
        for name in filter(_is_weight, _shapes(files[1])):
            parts = [file.get_tensor(name) for file in files[1:]]
            shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
            weights[name] = whole = parts[0].new_empty(shape)
            for rank, part in enumerate(parts):
                whole[rank::shares] = part
    return weights


def _is_weight(name: str) -> bool:
    return not name.startswith(STATES)


def _divided(folder: Path) -> tuple[Path, Description]:
    """The folder with divided tables in or at `folder`, and its description."""
    folder = folder / PARTS if (folder / PARTS).is_dir() else folder
    if not (folder / DIVISION).is_file():
        raise ValueError(f"{folder / DIVISION}: is missing")
    description = read_description(folder)
    return folder, description


def _shapes(file: Any) -> dict[str, torch.Size]:
    return {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading single tensors.

    Raises:
        ValueError: the file is missing or incomplete, also if that is noticed within the block.
        ImportError: safetensors is not installed.
    """
    safetensors = needed("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing") from None
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


# -- models ----------------------------------------------------------------------------------------


def described_model(description: Description, source: Path) -> nn.Module:
    """The model that a description names, with new weights.

    Args:
        description: what is described.
        source: the file of the description, for messages.

    Raises:
        ValueError: an unknown model, or options that do not exist or do not fit.
    """
    name = description.architecture
    if name is None:
        raise ValueError(f"{source}: architecture: is missing; the model is not of this library")
    try:
        options = current_options(name, description.options, saved=True)
        known = model_options(name)
        for option, value in options.items():
            if option in known and not fits(value, known[option]):
                raise ValueError(f"{option}: got {value!r}, want {known[option]}")
        # JSON has no tuples
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        model = create_model(name, **options)
    except _TooLarge:
        raise
    except Exception as error:  # options from a file can fail anywhere in the model's code
        raise ValueError(f"{source}: {name!r}: {_reason(error)}") from None
    classes, have = description.classes, getattr(model.config, "num_classes", None)
    if classes is not None and len(classes) != have:
        raise ValueError(f"{source}: classes: got {len(classes)} names, want {have or 0}")
    return model


def build(make: Callable[[], M], options: Mapping[str, Any], folder: Path) -> M:
    """Make a model whose weights are in a folder, if its sizes are those of the files.

    The model is first made on the meta device, which allocates nothing.

    Args:
        make: makes the model with new weights.
        options: the options of the model.
        folder: has the files of the weights.

    Raises:
        ValueError: weights are missing, unexpected, or of another shape (the message names them).
    """
    shapes = read_shapes(folder)
    source = folder / (PARTS if (folder / PARTS).is_dir() else WEIGHTS)
    most = max(LARGEST, sum(shape.numel() for shape in shapes.values()))
    for option, value in options.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int) and abs(number) > most:
                raise ValueError(
                    f"{source}: does not fit the model: its option {option} is {number}, but the "
                    f"file has only {sum(shape.numel() for shape in shapes.values())} numbers"
                )
    try:
        with torch.device("meta"), _at_most(8 * len(shapes) + 64):
            plain = make()
    except _TooLarge:
        raise ValueError(
            f"{source}: does not fit the model: the file has {len(shapes)} weights, and the model "
            "has many more"
        ) from None
    if wrong := misfits(plain, shapes):
        raise ValueError(f"{source}: does not fit the model: {shortened(wrong, '; ')}")
    return make()


# No option of a model is larger than this, unless its weights are: it bounds lists that a model
# makes before its first parameter.
LARGEST = 1 << 20


class _TooLarge(Exception):
    """A model registers more parameters than expected."""


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Stop the construction of a model in this thread when it registers more parameters."""
    thread, count = threading.get_ident(), 0

    def registered(*_: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > parameters:
            raise _TooLarge

    handle = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


def misfits(model: nn.Module, shapes: Mapping[str, torch.Size]) -> list[str]:
    """One line for each weight that is missing, unexpected, or of another shape."""
    have = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = [f"{name} is missing" for name in have if name not in shapes]
    wrong += [f"{name} is not in the model" for name in shapes if name not in have]
    return wrong + [
        f"{name} has shape {tuple(shapes[name])}, want {tuple(have[name])}"
        for name in have
        if name in shapes and shapes[name] != have[name]
    ]


def same_parameters(model: nn.Module) -> list[list[str]]:
    """Groups of names of parameters that are one and the same parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def tie(model: nn.Module, groups: list[list[str]], source: Path) -> None:
    """Make each group of parameters one and the same parameter.

    Raises:
        ValueError: a name that is not a parameter of the model, or parameters of other shapes.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for first, *others in filter(None, groups):
        for name in (first, *others):
            if name not in parameters or parameters[name].shape != parameters[first].shape:
                raise ValueError(f"{source}: tied: {name!r} cannot be the same as {first!r}")
        for name in others:
            owner, _, kind = name.rpartition(".")
            setattr(model.get_submodule(owner), kind, parameters[first])


def needed(name: str) -> Any:
    """Import a module of an optional package.

    Raises:
        ImportError: the package is not installed; the message names the extra that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ImportError(
            f"{package} is not installed; pip install 'translution[hub]'", name=package
        ) from None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
