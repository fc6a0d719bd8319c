"""Saves converted models to folders, and loads them again.

A folder of `save_converted` contains:

    <folder>/converted.safetensors   the weights of the whole model
            /conversion.json         what each converted layer is, and how to build the original
                                     model, where that is one of transformers

Neither file has a name that the original library looks for, so its own from_pretrained refuses the
folder, in place of bringing the converted layers back with random weights.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._version import __version__
from ...layouts import Layout
from ...modules.projections import RelativeLinear, projection
from ...utils.files import write_whole
from ...utils.words import shortened
from .converting import KINDS, attach
from .module import Converted
from .sources import family_of

__all__ = ["CONVERSION", "load_converted", "save_converted"]

CONVERSION, WEIGHTS = "conversion.json", "converted.safetensors"
FORMAT, VERSION = "translution-conversion-", 1  # the entry "format" of conversion.json
GEOMETRY = ("grid", "causal", "window", "dilation", "buckets", "prefix")  # fields of `Layout`


def save_converted(model: nn.Module, folder: Path | str) -> None:
    """Save a model that `convert` has changed: its weights, and what each converted layer is.

    `load_converted` loads it. Layers that `resize_offsets`, `make_relative` or `make_shared` have
    changed are saved as they are now. Each file is written completely before it replaces an
    earlier one.

    Args:
        model: the converted model.
        folder: the folder, which is created if it does not exist. Other files in it stay.

    Raises:
        ValueError: the model contains no converted layer, or one whose projections are not its own
            (adapters that are not merged, quantised layers, tables divided over processes).
        OSError: the folder cannot be written.
        ImportError: safetensors is not installed.
    """
    layers = _described_layers(model)
    about = {
        "format": f"{FORMAT}{VERSION}", "translution": __version__, "host": _host_of(model),
        "layers": layers,
    }  # fmt: skip
    from safetensors.torch import save_model

    text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / WEIGHTS, lambda to: save_model(model, str(to), {"format": "pt"}))
    write_whole(folder / CONVERSION, lambda to: to.write_text(text, "utf-8"))


def load_converted(folder: Path | str, model: nn.Module | None = None) -> Any:
    """Load a model that `save_converted` has saved.

    Args:
        folder: the folder.
        model: the original model, which is then converted in place and gets the saved weights. It
            is built as it was before the conversion; its weights do not matter. It may be left out
            if it is a model of transformers, which is then built from the saved configuration.

    Returns:
        the converted model: `model` with its device, dtype and mode; or a new one on the CPU, in
        evaluation mode and in the dtype in which it was saved.

    Raises:
        ValueError: the folder contains no converted model, `model` is missing or is another one, or
            the weights do not fit (the message names them). `model` is unchanged then.
        OSError: a file cannot be read.
        ImportError: safetensors is not installed, or transformers where it is needed.
    """
    from safetensors.torch import load_model

    folder = Path(folder).expanduser()
    about = _read(folder)
    shapes, tied, dtypes = _read_shapes(folder / WEIGHTS)
    host = model
    if host is None:
        most = len(shapes)
        with torch.device("meta"):  # a model of any size costs nothing here
            _check(_build(about, folder, most), about, shapes, tied, folder)
        host = _build(about, folder, most)
        host = (host.to(dtypes.pop()) if len(dtypes) == 1 else host).eval()
    attach(host, _check(host, about, shapes, tied, folder))
    load_model(host, str(folder / WEIGHTS))
    return host


def load_weights(model: nn.Module, folder: Path) -> None:
    """Give a converted model the weights in a folder of `save_converted`.

    Raises:
        ValueError: the folder contains no converted model, or one that was converted in another
            way.
    """
    from safetensors.torch import load_model

    have = [layer | {"layout": Layout(**layer["layout"])} for layer in _described_layers(model)]
    want = _read(folder)["layers"]
    if have != [{name: layer[name] for name in have[0]} for layer in want]:
        raise ValueError(f"model: is converted in another way than the one in {folder}")
    load_model(model, str(folder / WEIGHTS))


def _described_layers(model: nn.Module) -> list[dict[str, Any]]:
    """The entry "layers" of conversion.json."""
    named: dict[int, tuple[Converted, list[str]]] = {}
    modules = model.named_modules(remove_duplicate=False) if isinstance(model, nn.Module) else ()
    for name, module in modules:
        if isinstance(module, Converted):
            named.setdefault(id(module), (module, []))[1].append(name)
    if not named or "" in (names[0] for _, names in named.values()):
        raise ValueError(f"model: got {type(model).__name__}, want one that `convert` has changed")
    return [_described(converted, names) for converted, names in named.values()]


def _described(converted: Converted, names: list[str]) -> dict[str, Any]:
    layer = converted.layer
    for name in "qkv":
        part = getattr(layer, f"{name}_proj")
        if type(part) not in (nn.Linear, RelativeLinear):
            raise ValueError(
                f"{names[0]}.layer.{name}_proj: is a {type(part).__name__}, want an nn.Linear or a "
                "table (merge adapters first)"
            )
    if any(getattr(part, "shard", None) is not None for part in layer.modules()):
        raise ValueError(f"{names[0]}: its tables are divided over processes, want whole ones")
    kind = next(to for (to, axes), cls in KINDS.items() if type(layer) is cls)
    layout = dataclasses.asdict(layer.layout)
    return {
        "names": names, "to": kind, "relative": layer.relative, "rank": getattr(layer, "rank", 0),
        "layout": {name: layout[name] for name in GEOMETRY}, "position": layer.position,
        "scale": layer.scale,
    }  # fmt: skip


def _host_of(model: Any) -> dict[str, Any] | None:
    """How to build the original model, if that is known: a model of transformers is."""
    kind = type(model)
    if kind.__module__.partition(".")[0] != "transformers" or not hasattr(model, "config"):
        return None
    return {"library": "transformers", "class": kind.__name__, "config": model.config.to_dict()}


def _read(folder: Path) -> dict[str, Any]:
    """The conversion.json of a folder."""
    path = folder / CONVERSION
    if not path.is_file():
        raise ValueError(f"{folder}: holds no {CONVERSION}, want a folder of save_converted")
    try:
        about = json.loads(path.read_text("utf-8"))
        name, version = str(about["format"]).rsplit("-", 1)
        known = name == FORMAT.rstrip("-") and int(version) <= VERSION
        layers = [
            dict(layer, layout=Layout(**_tuples(layer["layout"]))) for layer in about["layers"]
        ]
        for layer in layers:
            names, scale = [str(name) for name in layer["names"]], float(layer["scale"])
            rank, relative = int(layer["rank"]), str(layer["relative"])
            layer.update(names=names, scale=scale, rank=rank, relative=relative)
            layer["kind"] = KINDS[layer["to"], len(layer["layout"].grid)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a description of a converted model ({error!r})") from None
    if not known:
        raise ValueError(
            f"{path}: format {about['format']!r}, want {FORMAT}{VERSION}; a newer version of "
            "translution may be able to read it"
        )
    return about | {"layers": layers}


def _tuples(geometry: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples."""
    made = {name: geometry[name] for name in GEOMETRY}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in made.items()}


def _read_shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], set[str], set[torch.dtype]]:
    """What a file of weights holds, without reading the weights.

    Returns:
        the shape of each tensor by its name; the names of tensors that share the memory of one of
        these; and the floating point dtypes.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            kinds = {part.get_dtype() for part in slices.values()}
            tied = set(file.metadata() or {}) - {"format"}
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
             "BF16": torch.bfloat16}  # fmt: skip
    return shapes, tied, {names[kind] for kind in kinds & names.keys()}


def _build(about: Mapping[str, Any], folder: Path, most: int) -> Any:
    """The original model, from the configuration that was saved, with new weights.

    Args:
        about: conversion.json.
        folder: for the messages.
        most: the number of saved tensors, which no number of layers can exceed.
    """
    host = about.get("host")
    if not host:
        raise ValueError(
            f"model: got None, but {folder / CONVERSION} does not say how to build the original "
            "model; want it, built as it was before the conversion"
        )
    import transformers

    kind: Any = getattr(transformers, str(host.get("class")), None)
    config = host.get("config")
    fits = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if host.get("library") != "transformers" or not fits or not isinstance(config, dict):
        raise ValueError(f"{folder / CONVERSION}: names no model of transformers ({host})")
    made = kind.config_class.from_dict(config)
    depth = getattr(made, "num_hidden_layers", 0)
    if not isinstance(depth, int) or depth > most:
        raise ValueError(
            f"{folder / CONVERSION}: num_hidden_layers is {depth!r}, but the folder holds only "
            f"{most} tensors"
        )
    return kind._from_config(made)


def _check(
    host: nn.Module,
    about: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    tied: set[str],
    folder: Path,
) -> dict[str, Converted]:
    """The new layers of a model, by name, which is unchanged; their weights are not set yet.

    Raises:
        ValueError: the model is another one than that which was converted.
    """
    made: dict[str, Converted] = {}
    want = {name: tuple(value.shape) for name, value in host.state_dict().items()}
    for layer in about["layers"]:
        new = _new_layer(host, layer, shapes, folder)
        for name in layer["names"]:
            made[name] = new
            want = {key: v for key, v in want.items() if not key.startswith(f"{name}.")}
            state = new.state_dict(prefix=f"{name}.")
            want |= {key: tuple(value.shape) for key, value in state.items()}
    wrong = [f"{name} is missing" for name in want if name not in shapes and name not in tied]
    wrong += [f"{name} is not in the model" for name in shapes if name not in want]
    wrong += [
        f"{name} has shape {shapes[name]}, want {want[name]}"
        for name in want
        if name in shapes and shapes[name] != want[name]
    ]
    if wrong:
        raise ValueError(f"{folder / WEIGHTS}: does not fit the model: {shortened(wrong, '; ')}")
    return made


def _new_layer(
    host: nn.Module, saved: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> Converted:
    """One layer as it was saved, with the other parts of the module that it replaces."""
    name = saved["names"][0]
    parts = [m for n, m in host.named_modules(remove_duplicate=False) if n in saved["names"]]
    family = family_of(parts[0]) if parts else None
    if len(parts) < len(saved["names"]) or family is None:
        got = type(parts[0]).__name__ if parts else "nothing"
        raise ValueError(
            f"model: got {got} at {name}, want the attention that was converted there (the "
            "original model, as it was before the conversion)"
        )
    module: Any = parts[0]
    try:
        source = family.describe(module)
    except ValueError as error:
        raise ValueError(f"{name} ({type(module).__name__}): {error}") from None
    layout, weight = saved["layout"], source.matrices["q"][0]
    more = {"rank": saved["rank"]} if saved["to"] == "alpha" else {}
    with weight.device:
        layer: Any = saved["kind"](
            source.dim, layout.grid, heads=source.heads, head_dim=source.head_dim,
            dropout=source.dropout, relative=saved["relative"] if more else "", **more,
            **{field: getattr(layout, field) for field in GEOMETRY[1:]},
        )  # fmt: skip
        for side in "qkv":
            key = f"{name}.layer.{side}_proj"
            shape = shapes.get(f"{key}.weight", ())
            if len(shape) not in (2, 3):
                raise ValueError(f"{folder / WEIGHTS}: has no matrix or table {key}.weight")
            sizes = shape[1:] if len(shape) == 3 else shape[::-1]
            classes = layout.classes if len(shape) == 3 else None
            bias = f"{key}.bias" in shapes
            made: Any = projection(sizes[0], sizes[1], classes, bias)
            if classes is None:
                made.requires_grad_(any(p.requires_grad for p in module.parameters()))
            setattr(layer, f"{side}_proj", made)
    layer.to(weight.dtype)
    layer.relative, layer.position, layer.scale = (
        saved["relative"],
        saved["position"],
        saved["scale"],
    )
    layer.train(module.training).o_proj = source.out
    new = Converted(layer, source, family, family.arguments(module))
    new.training = module.training
    return new
