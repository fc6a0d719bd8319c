"""The correspondence between a published state_dict and the tensors of our modules.

Each module has one list of entries, which both loading and export use, so that they agree.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = [
    "Entry",
    "Options",
    "concatenated",
    "constant",
    "entries",
    "linear",
    "same_names",
    "table",
    "with_prefix",
]


@dataclass(frozen=True)
class Options:
    """The options on which the meaning of entries depends.

    Attributes:
        exchanged, image_size: the arguments of `load_published`.
        map_size: the height and width of the feature map that a layer of Swin gets, if it is known.
    """

    exchanged: bool = False
    image_size: int = 224
    map_size: int | None = None


@dataclass(frozen=True)
class Entry:
    """One tensor of a published state_dict.

    Attributes:
        name, shape: its published name and shape.
        read: given the published tensor, returns pairs of one of our tensors and the value that is
            added to it.
        write: makes the published tensor from ours.
        unread: describes the part that changes no output, if there is one. We have no tensor for
            that part, and write zeros.
        constant: whether the tensor is not learned. A loaded one must then equal that of `write`.
        optional: whether it may be missing. It is not exported then.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[Tensor], Iterable[tuple[Tensor, Tensor]]]
    write: Callable[[], Tensor]
    unread: str = ""
    constant: bool = False
    optional: bool = False


@functools.singledispatch
def entries(module: nn.Module, options: Options) -> Iterator[Entry]:
    """The entries of the published counterpart of a module.

    Raises:
        ValueError: the module has none, or has an option that the published code does not have.
    """
    raise ValueError(
        f"module: got {type(module).__name__}, want an attention layer (or nn.Sequential of its "
        "LayerNorm and it), ViT, GPT, ACmix2d, window attention, ResNet, Swin, or a block of these"
    )


def with_prefix(prefix: str, children: Iterable[Entry]) -> Iterator[Entry]:
    """The same entries, with `prefix` and a dot before each name."""
    return (dataclasses.replace(entry, name=f"{prefix}.{entry.name}") for entry in children)


def concatenated(name: str, *ours: Tensor, shape: Iterable[int] | None = None) -> Entry:
    """One published tensor that is the concatenation of ours on the first axis.

    Args:
        name: the published name.
        ours: tensors of equal shape.
        shape: the published shape, if it is not that of the concatenation.
    """
    first, count = ours[0].shape, len(ours)
    size = tuple(shape) if shape is not None else (count * first[0], *first[1:]) if first else ()

    def read(x: Tensor) -> list[tuple[Tensor, Tensor]]:
        parts = [x] if count == 1 else x.chunk(count)
        return [(our, part.reshape(our.shape)) for our, part in zip(ours, parts, strict=True)]

    def write() -> Tensor:
        return torch.cat([our.detach().reshape(-1) for our in ours]).reshape(size)

    return Entry(name, size, read, write)


def same_names(prefix: str, module: nn.Module) -> Iterator[Entry]:
    """The entries of a module whose published counterpart has the same names and shapes."""
    return (concatenated(f"{prefix}.{k}", v) for k, v in module.state_dict(keep_vars=True).items())


def linear(prefix: str, *convolutions: nn.Module) -> Iterator[Entry]:
    """One published linear layer that is the concatenation of 1×1 convolutions of ours."""
    for key, first in convolutions[0].state_dict(keep_vars=True).items():
        ours = [getattr(module, key) for module in convolutions]
        size = (len(ours) * first.shape[0], *first.shape[1:2])
        yield concatenated(f"{prefix}.{key}", *ours, shape=size)


def table(name: str, weight: Tensor, rows: Tensor, total: int) -> Entry:
    """A published table [total, in, out], of which our `weight` has the given rows, in order."""

    def write() -> Tensor:
        full_table = weight.detach().new_zeros(total, *weight.shape[1:])
        full_table[rows.to(weight.device)] = weight.detach()
        return full_table

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
    """A published buffer whose value follows from the module's options."""
    return Entry(name, tuple(value.shape), lambda x: [], value.clone, constant=True)
