"""Reads weights from a dictionary or a file."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["read"]

WRAPPED = ("state_dict", "model")  # the entries under which training scripts save the weights


def read(source: Mapping[str, Any] | str | Path) -> dict[str, Tensor]:
    """The tensors of a state_dict or of a file, by name.

    The state_dict may be an entry "state_dict" or "model" of a larger dict. If all names begin with
    "module.", as DataParallel writes them, this prefix is removed.

    Raises:
        ValueError: there are no tensors by name, or the file is incomplete or contains objects
            other than tensors and plain values.
        OSError: the file cannot be read.
    """
    where, content = "source", source
    if isinstance(source, str | Path):
        where, content = str(source), _load(Path(source))
    for key in WRAPPED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    named = isinstance(content, Mapping) and all(isinstance(name, str) for name in content)
    weights: dict[str, Tensor] = dict(cast(Mapping[str, Tensor], content)) if named else {}
    if not weights or not all(isinstance(t, Tensor) for t in weights.values()):
        got = _description(content)
        raise ValueError(f"{where}: got {got}, want tensors by name (a state_dict)")
    if all(name.startswith("module.") for name in weights):
        return {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    return weights


def _description(source: Any) -> str:
    if not isinstance(source, Mapping):
        return type(source).__name__
    others = [str(name) for name, value in source.items() if not isinstance(value, Tensor)]
    return f"a dict with {len(source)} entries, some of which are not tensors: {others[:5]}"


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
            f"{path}: holds more than tensors and plain values, or was not written by torch.save. "
            "It was not opened, because unpickling can run any code. If you trust its source, open "
            "it yourself with torch.load(path, weights_only=False), and save only its weights with "
            "safetensors.torch.save_file or torch.save. "
            f"({str(error).strip().splitlines()[0]})"
        ) from None
    except Exception as error:  # torch raises many types for a file with arbitrary bytes
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the file cannot be read; torch's own OSErrors have no file name
        first = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise ValueError(f"{path}: not a whole file of torch.save ({first})") from None
