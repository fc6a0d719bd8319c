"""Weights of the published code: of Translution (layers, ViT, GPT) and of ACmix (ResNet, Swin)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import acmix, layers, models  # noqa: F401  (register what they know)
from .entries import Entry, How, entries
from .source import read

__all__ = ["export_published", "load_published"]


def load_published(
    module: nn.Module,
    source: Mapping[str, Any] | str | Path,
    *,
    exchanged: bool = False,
    image_size: int = 224,
) -> list[str]:
    """Read weights that were trained with the published code. All of them or nothing is read.

    The outputs are then those of the published code. Some of its entries change no output, are not
    held here, and are named in what is returned: rows of a ViT's last tables that no class token
    asks for (in a model without `all_rows`); the bias of ACmix's position projection, which cancels
    in the softmax; rotations that layers with a table of v may bring along and never use. What a
    ViT learned as the position of its class token is added to the token.

    Args:
        module: a layer, a block or a whole model, made with the same options. Published attention
            layers have their layer norm within; for one alone, without its model, give
            ``nn.Sequential(nn.LayerNorm(dim), layer)``. ACmix is made with ``published=True``, and
            so are a GPT, for its two last norms, and a rotary ViT, which has positions as well.
        source: a state_dict, a dict with one under "state_dict" or "model", or a file of it:
            safetensors (by its ending), or what ``torch.load(weights_only=True)`` opens.
        exchanged: weights of the 2-D code of before December 2025, where layers with tables for
            both q and k used each for the other. The file does not tell; those of the 1-D code of
            that time mean something else again, and are not to be loaded.
        image_size: (Swin) pixels that the published model was made for; it holds masks of its maps.

    Returns:
        the entries that nothing reads, whole or in part, and what of them.

    Raises:
        ValueError: entries that are missing, unexpected, of another shape or another constant, each
            by its name; a module that has no published twin, and why; a file that can't be loaded.
        OSError: a file that cannot be read.
    """
    known = _entries(module, How(exchanged, image_size))
    weights = read(source)
    _check(known, weights)
    begun: set[int] = set()
    with torch.no_grad():
        for entry in known:
            if entry.name not in weights:
                continue
            for ours, value in entry.read(weights[entry.name]):
                value = value.to(ours.device, ours.dtype)
                ours.add_(value) if id(ours) in begun else ours.copy_(value)
                begun.add(id(ours))
    unread = (entry for entry in known if entry.unread and entry.name in weights)
    return [f"{entry.name}: {entry.unread}" for entry in unread]


def export_published(
    module: nn.Module, *, exchanged: bool = False, image_size: int = 224
) -> dict[str, Tensor]:
    """The state_dict that the published code would load: the inverse of `load_published`.

    Entries that nothing reads are zeros.

    Args:
        module, exchanged, image_size: as in `load_published`.

    Returns:
        tensors of their own, by their published names.

    Raises:
        ValueError: a module that has no published twin, and why.
    """
    known = _entries(module, How(exchanged, image_size))
    return {entry.name: entry.write() for entry in known if not entry.optional}


def _entries(module: nn.Module, how: How) -> list[Entry]:
    if any(t.is_meta for t in module.state_dict().values()):
        raise ValueError("module: is on the meta device, want one that holds numbers")
    known = list(entries(module, how))
    both = any({"q", "k"} <= set(getattr(m, "relative", "")) for m in module.modules())
    if how.exchanged and not both:
        raise ValueError("exchanged: got True, but no layer has tables for both q and k")
    return known


def _check(known: Iterable[Entry], weights: Mapping[str, Tensor]) -> None:
    """All names, shapes and constants at once, so that one look shows what differs."""
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
        elif entry.constant and not _alike(x, entry.write()):
            wrong.append(f"constant: {name} is not what the module's options make it")
    if wrong:
        raise ValueError("source: does not fit the module\n  " + "\n  ".join(wrong))


def _alike(x: Tensor, want: Tensor) -> bool:
    """Loosely, as constants may have been rounded to half precision."""
    return torch.allclose(x.cpu().double(), want.cpu().double(), rtol=0.0, atol=0.01)
