"""Reads and writes weights of the papers' published code.

Of Translution's code these are the weights of layers, ViT and GPT; of ACmix's code, those of
layers, ResNet and Swin.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...modules.attention import Attention
from . import acmix, layers, models  # noqa: F401  (each registers its modules with `entries`)
from .entry import Entry, Options, entries
from .inference import PublishedModel, infer_published
from .source import read

__all__ = ["PublishedModel", "export_published", "infer_published", "load_published"]


def load_published(
    module: nn.Module,
    source: Mapping[str, Any] | str | Path,
    *,
    exchanged: bool | None = None,
    image_size: int = 224,
) -> list[str]:
    """Load weights that were trained with the published code into a module of this library.

    The module's outputs are then those of the published code. The module is unchanged if an error
    is raised.

    A few published entries change no output, and modules here do not have them; the return value
    names them. They are the table rows of a ViT's last block that its class token does not use (in
    a model without ``full_last_block=True``); the bias of ACmix's position projection, which
    cancels in the softmax; and the rotations that a layer with a table for v may contain and never
    uses. A published ViT has a learned position for its class token, which is added to the token.

    Some settings of the published code leave no trace in the weights, so a file cannot show that
    the module has others: the version of Translution's code (`exchanged`), pool of a ViT, and
    `qk_scale` of Swin. Make the module with those that the published model had.

    Args:
        module: a layer, a block or a whole model, made with the same options as the published one.
            Published attention layers contain their layer norm, so for a single layer give
            ``nn.Sequential(nn.LayerNorm(dim), layer)``. Make ACmix with ``published=True``, a GPT
            with ``double_final_norm=True``, and a rotary ViT with ``learned_positions=True``.
        source: a state_dict; a dict that contains one as "state_dict" or "model"; or the path of a
            file that contains either: safetensors if its name ends so, else a file that
            ``torch.load(weights_only=True)`` opens.
        exchanged: whether the weights come from the 2-D code before 2025-11-29 (its commit
            ef01c2b), in which layers with tables for both q and k used each table for the other.
            The file does not show which version wrote it. None is False, with a UserWarning where
            it matters; so is the same question for weights of the 1-D code, which cannot be loaded
            if they were trained with a version before 2025-12-19 (e35f07d): the names and shapes
            are the same, but it computed something else (at times, scores from the key alone), and
            no layer here computes that. True or False states that you know the version.
        image_size: (Swin) the image size in pixels of the published model, whose state_dict
            contains masks for it.

    Returns:
        the names of the entries that were not used, whole or in part, each with the unused part.

    Raises:
        ValueError: entries are missing, unexpected, or have another shape or another constant value
            (all of them are named); the module has no published counterpart (with the reason); or
            the file cannot be loaded.
        OSError: a file cannot be read.
    """
    known = _entries(module, Options(bool(exchanged), image_size))
    weights = read(source)
    _check(known, weights)
    if exchanged is None:
        _warn_of_versions(module)
    started: set[int] = set()
    with torch.no_grad():
        for entry in known:
            if entry.name not in weights:
                continue
            for ours, value in entry.read(weights[entry.name]):
                value = value.to(ours.device, ours.dtype)
                ours.add_(value) if id(ours) in started else ours.copy_(value)
                started.add(id(ours))
    unread = (entry for entry in known if entry.unread and entry.name in weights)
    return [f"{entry.name}: {entry.unread}" for entry in unread]


def export_published(
    module: nn.Module,
    *,
    exchanged: bool = False,
    image_size: int = 224,
    unused_rotations: bool = False,
) -> dict[str, Tensor]:
    """Make a state_dict that the published code can load. This is the inverse of `load_published`.

    Entries that change no output are zeros.

    Args:
        module, exchanged, image_size: as in `load_published`.
        unused_rotations: whether layers with a table for v only also get the rotations that the
            published models of `rope_translution` have there and never use. Those models do not
            load without them, and the models of `translution` do not load with them.

    Returns:
        tensors by their published names, which share no memory with the module.

    Raises:
        ValueError: the module has no published counterpart (with the reason).
    """
    known = _entries(module, Options(exchanged, image_size))
    return {entry.name: entry.write() for entry in known if unused_rotations or not entry.optional}


def _warn_of_versions(module: nn.Module) -> None:
    """Warn if earlier versions of the published code computed something else from such weights."""
    both = [m for m in module.modules() if {"q", "k"} <= set(getattr(m, "relative", ""))]
    causal = {bool(layer.layout.causal) for layer in both if isinstance(layer, Attention)}
    if False in causal:
        warnings.warn(
            "exchanged: got None. Weights of the published 2-D code from before 2025-11-29 (commit "
            "ef01c2b) need exchanged=True, and later ones exchanged=False, which is assumed; the "
            "weights do not show their version",
            stacklevel=3,
        )
    if True in causal:
        warnings.warn(
            "exchanged: got None. Weights of the published 1-D code from before 2025-12-19 (commit "
            "e35f07d) cannot be used, because it computed something else from them. The weights do "
            "not show their version; if they are later ones, exchanged=False says so",
            stacklevel=3,
        )


def _entries(module: nn.Module, options: Options) -> list[Entry]:
    if any(t.is_meta for t in module.state_dict().values()):
        raise ValueError("module: got one on the meta device, want one whose weights have values")
    known = list(entries(module, options))
    both = any({"q", "k"} <= set(getattr(m, "relative", "")) for m in module.modules())
    if options.exchanged and not both:
        raise ValueError("exchanged: got True, but no layer has tables for both q and k")
    return known


def _check(known: Iterable[Entry], weights: Mapping[str, Tensor]) -> None:
    """Raise one ValueError that lists all names, shapes and constants that differ."""
    names = {entry.name: entry for entry in known}
    required = (name for name, entry in names.items() if not entry.optional)
    wrong = [f"missing: {name}" for name in required if name not in weights]
    wrong += [f"unexpected: {name}" for name in weights if name not in names]
    for name, entry in names.items():
        if name not in weights:
            continue
        x = weights[name]
        if tuple(x.shape) != entry.shape:
            wrong.append(f"shape: {name} is {tuple(x.shape)}, want {entry.shape}")
        elif entry.constant and not _nearly_equal(x, entry.write()):
            wrong.append(f"constant: {name} differs from its value for the module's options")
    if wrong:
        raise ValueError("source: does not fit the module\n  " + "\n  ".join(wrong))


def _nearly_equal(x: Tensor, want: Tensor) -> bool:
    """Compare with a tolerance of 0.01, as constants may have been rounded to half precision."""
    return torch.allclose(x.cpu().double(), want.cpu().double(), rtol=0.0, atol=0.01)
