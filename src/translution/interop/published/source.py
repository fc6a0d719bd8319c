"""Weights from a dictionary or a file, freed from what is around them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["read"]

WRAPPED = ("state_dict", "model")  # where training scripts put the weights


def read(source: Mapping[str, Any] | str | Path) -> dict[str, Tensor]:
    """The tensors of a state_dict by name, or those of a file.

    The weights may stand in an entry "state_dict" or "model" beside other things, and their names
    may begin with the "module." of DataParallel.

    Raises:
        ValueError: no tensors by name, or a file that isn't whole or holds more than tensors and
            plain values.
        OSError: a file that cannot be read.
    """
    where, found = "source", source
    if isinstance(source, str | Path):
        where, found = str(source), _load(Path(source))
    for key in WRAPPED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    named = isinstance(found, Mapping) and all(isinstance(name, str) for name in found)
    weights: dict[str, Tensor] = dict(cast(Mapping[str, Tensor], found)) if named else {}
    if not weights or not all(isinstance(t, Tensor) for t in weights.values()):
        got = _told(found)
        raise ValueError(f"{where}: got {got}, want tensors by name (a state_dict)")
    if all(name.startswith("module.") for name in weights):
        return {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    return weights


def _told(source: Any) -> str:
    if not isinstance(source, Mapping):
        return type(source).__name__
    others = [str(name) for name, value in source.items() if not isinstance(value, Tensor)]
    return f"a dict with {len(source)} entries, of which no tensors are {others[:5]}"


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds more than tensors and plain values, or is no file of torch.save, and "
            "is not opened, as unpickling can run any code. If you trust where it came from, open "
            "it once yourself with torch.load(path, weights_only=False), and write its weights "
            "alone with safetensors.torch.save_file or torch.save. "
            f"({str(error).strip().splitlines()[0]})"
        ) from None
    except Exception as error:  # what other bytes lead to is as good as arbitrary
        if isinstance(error, OSError) and error.filename is not None:
            raise  # it cannot be read; torch's own OSErrors name no file
        first = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise ValueError(f"{path}: not a whole file of torch.save ({first})") from None
