"""A published state_dict, entry by entry, beside the tensors of ours that it stands for.

Reading and writing are both made from one list of entries per module, so they cannot disagree.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Entry", "How", "constant", "entries", "joined", "linear", "table", "under", "whole"]


@dataclass(frozen=True)
class How:
    """What decides the meaning of entries beside the module: see `load_published`."""

    exchanged: bool = False
    image_size: int = 224


@dataclass(frozen=True)
class Entry:
    """One published tensor.

    name, shape: its own. read: the tensors of ours that it makes, and what it adds to each. write:
    the tensor, made from ours. unread: the part of it that changes no output, if there is one:
    ours don't hold it, and zeros are written. constant: holds nothing learned; what comes must be
    what is written. optional: may be missing, and is not written.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[Tensor], Iterable[tuple[Tensor, Tensor]]]
    write: Callable[[], Tensor]
    unread: str = ""
    constant: bool = False
    optional: bool = False


@functools.singledispatch
def entries(module: nn.Module, how: How) -> Iterator[Entry]:
    """The entries of the published twin of a module.

    Raises:
        ValueError: it has none, or an option that the published code does not have.
    """
    raise ValueError(
        f"module: got {type(module).__name__}, want an attention layer (or nn.Sequential of its "
        "LayerNorm and it), ViT, GPT, ACmix2d, window attention, ResNet, Swin, or a block of these"
    )


def under(prefix: str, some: Iterable[Entry]) -> Iterator[Entry]:
    """The same entries, with longer names."""
    return (dataclasses.replace(entry, name=f"{prefix}.{entry.name}") for entry in some)


def joined(name: str, *ours: Tensor, shape: Iterable[int] | None = None) -> Entry:
    """Tensors of equal shape, one after the other on the first axis; `shape` is of them all, where
    it differs by more."""
    first, count = ours[0].shape, len(ours)
    size = tuple(shape) if shape is not None else (count * first[0], *first[1:]) if first else ()

    def read(x: Tensor) -> list[tuple[Tensor, Tensor]]:
        parts = [x] if count == 1 else x.chunk(count)
        return [(our, part.reshape(our.shape)) for our, part in zip(ours, parts, strict=True)]

    def write() -> Tensor:
        return torch.cat([our.detach().reshape(-1) for our in ours]).reshape(size)

    return Entry(name, size, read, write)


def whole(prefix: str, module: nn.Module) -> Iterator[Entry]:
    """All that a module holds, by the same names and in the same shapes."""
    return (joined(f"{prefix}.{k}", v) for k, v in module.state_dict(keep_vars=True).items())


def linear(prefix: str, *convolutions: nn.Module) -> Iterator[Entry]:
    """1×1 convolutions of ours as one linear layer."""
    for key, first in convolutions[0].state_dict(keep_vars=True).items():
        ours = [getattr(module, key) for module in convolutions]
        size = (len(ours) * first.shape[0], *first.shape[1:2])
        yield joined(f"{prefix}.{key}", *ours, shape=size)


def table(name: str, weight: Tensor, rows: Tensor, total: int) -> Entry:
    """A table [total, in, out] of which ours holds `rows`, in that order."""

    def write() -> Tensor:
        all_rows = weight.detach().new_zeros(total, *weight.shape[1:])
        all_rows[rows.to(weight.device)] = weight.detach()
        return all_rows

    size = (total, *weight.shape[1:])
    rest = total - len(rows)
    return Entry(
        name,
        size,
        lambda x: [(weight, x[rows.to(x.device)])],
        write,
        unread=f"{rest} of its {total} rows" if rest else "",
    )


def constant(name: str, value: Tensor) -> Entry:
    """A buffer that follows from the options."""
    return Entry(name, tuple(value.shape), lambda x: [], value.clone, constant=True)
