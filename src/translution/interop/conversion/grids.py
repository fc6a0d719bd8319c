"""The patch grid of each image that a converted model processes.

A layer sees tokens, and their number alone does not say whether 8 patches are 2×4 or 4×2. The grid
belongs to one call, so it is never stored in the model. There are three places it comes from, in
this order:

- the tokens: the output of the patch embedding and the inputs and outputs of the blocks carry the
  grid as a mark on their memory. Activation checkpointing computes a block again from the tensor
  that it kept, which has the mark; and blocks may be called one by one.
- the open calls of the same thread: while a model runs, its patch embedding reports the grid.
- the number of tokens, where the layer accepts only one grid of this number.

Otherwise the layer raises a ValueError.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...layouts import Layout

__all__ = ["Patches", "check_sizes", "follow_patches", "only_grid", "patch_grid"]

Grid = tuple[int, ...]
MARK = "_translution_patch_grids"


class _Open(threading.local):
    """The calls of this thread that have not returned yet.

    Attributes:
        grids: the grid of each open call, from the outermost to the innermost; None where it is not
            known yet.
        traced: the grid of the image that torch.compile or torch.export traces.
    """

    grids: tuple[Grid | None, ...] = ()
    traced: Grid | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()  # a copy of the model has no open calls


class Patches:
    """Follows the patch grid through the calls of a model, and through its parts.

    Its methods are hooks: `record` of the patch embedding's convolution, `open_model` and
    `close_model` of the model, `open_part` and `close` of the embedding and the blocks.
    """

    def __init__(self) -> None:
        self.open = _Open()

    def __setstate__(self, state: Any) -> None:
        self.open = _Open()  # an earlier version stored a grid instead

    @property
    def grid(self) -> Grid | None:
        """The grid of the innermost open call of this thread; None if it is not known."""
        if torch.compiler.is_compiling():
            return self.open.traced
        return self.open.grids[-1] if self.open.grids else None

    def record(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Note the grid of the convolution's output [batch, dim, rows, columns]."""
        grid = tuple(output.shape[-2:])
        if torch.compiler.is_compiling():  # the model's own hooks are called outside of the trace
            self.open.traced = grid
        else:
            self.open.grids = (grid,) * len(self.open.grids)

    def open_model(self, module: nn.Module, args: Any) -> None:
        """A call of the model begins; its grid is not known yet."""
        if not torch.compiler.is_compiling():
            self.open.grids = (*self.open.grids, None)

    def open_part(self, module: nn.Module, args: Any, given: Any) -> None:
        """A call of the embedding or of a block begins."""
        if torch.compiler.is_compiling():
            return
        tokens = _first_tensor((args, given))
        grid = _marked_grid(tokens) or self.grid
        _mark(tokens, grid)
        self.open.grids = (*self.open.grids, grid)

    def close(self, module: nn.Module, args: Any, output: Any) -> None:
        """A call of a part ends, by its result or by an error."""
        if torch.compiler.is_compiling() or not self.open.grids:
            return
        grid = self.grid
        self.open.grids = self.open.grids[:-1]
        _mark(_first_tensor(output), grid)

    def close_model(self, module: nn.Module, args: Any, output: Any) -> None:
        """A call of the model ends, by its result or by an error."""
        self.open.traced = None
        self.close(module, args, output)

    @contextlib.contextmanager
    def using(self, grid: Grid) -> Iterator[None]:
        """Within this context, the images of this thread have the given grid."""
        before, self.open.grids = self.open.grids, (*self.open.grids, grid)
        try:
            yield
        finally:
            self.open.grids = before


def follow_patches(model: nn.Module, embedding: nn.Module, layers: Sequence[str]) -> Patches:
    """Register the hooks that follow the patch grid, and return the `Patches` that they belong to.

    Args:
        model: the model.
        embedding: the convolution that makes patches of an image.
        layers: the names of the layers that need the grid.
    """
    patches = Patches()
    source = next(name for name, module in model.named_modules() if module is embedding)
    paths = [name.split(".") for name in (source, *layers)]
    same = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    host = [names[0] for names in same]
    for depth in range(len(host) + 1):  # the model, and all it delegates to
        whole = model.get_submodule(".".join(host[:depth]))
        whole.register_forward_pre_hook(patches.open_model, prepend=True)
        whole.register_forward_hook(patches.close_model, always_call=True)
    embedding.register_forward_hook(patches.record)
    parts = {id(part): part for name in layers for part in _parts(model, name, len(host))}
    if len(source.split(".")) > len(host) + 1:
        part = model.get_submodule(".".join(source.split(".")[: len(host) + 1]))
        parts[id(part)] = part
    for part in parts.values():
        part.register_forward_pre_hook(patches.open_part, prepend=True, with_kwargs=True)
        part.register_forward_hook(patches.close, always_call=True)
    return patches


@contextlib.contextmanager
def patch_grid(model: nn.Module, grid: Sequence[int]) -> Iterator[None]:
    """State the patch grid of images whose blocks are called without their model.

    A converted image model finds the grid of its images itself. Only where its blocks are called
    with tokens from elsewhere, and several grids have as many tokens, does the grid have to be
    given:

        with patch_grid(model, (2, 4)):
            y = model.forward_features(image)

    Args:
        model: a converted image model.
        grid: rows and columns of patches. It applies to calls from this thread inside the context.

    Raises:
        ValueError: the model contains no converted layer of an image model, or the grid is not two
            ints of at least 1.
    """
    found = [getattr(module, "patches", None) for module in model.modules()]
    patches = {id(each): each for each in found if isinstance(each, Patches)}
    if not patches:
        raise ValueError(
            f"model: got {type(model).__name__}, want an image model that `convert` has changed"
        )
    sizes = check_sizes(grid, 2)
    with contextlib.ExitStack() as stack:
        for each in patches.values():
            stack.enter_context(each.using(sizes))
        yield


def _parts(model: nn.Module, name: str, host: int) -> Iterator[nn.Module]:
    """The blocks of a model and the parts of one block: where tokens are marked with their grid.

    Some models compute only the inside of a block again when they checkpoint activations. So each
    part that the block's input passes on its way to the attention hands the mark on.

    Args:
        model: the model.
        name: the name of an attention layer; the blocks are in the innermost list that contains it.
        host: how many parts of this name are the name of the module that contains all layers.
    """
    path, start = name.split("."), host
    for depth in range(host, len(path)):
        whole = model.get_submodule(".".join(path[:depth]))
        if isinstance(whole, nn.ModuleList | nn.Sequential):
            start = depth
    for depth in range(start, len(path)):
        yield from model.get_submodule(".".join(path[:depth])).children()


def check_sizes(grid: Any, axes: int) -> tuple[int, ...]:
    """One size per axis, from a sequence or from one int for all axes."""
    sizes = tuple(grid) if isinstance(grid, Sequence) else (grid,) * axes
    valid = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in sizes)
    if len(sizes) != axes or not valid:
        raise ValueError(f"grid: got {grid!r}, want {axes} ints of at least 1 (or one for all)")
    return sizes


def _first_tensor(values: Any) -> Tensor | None:
    return next((value for value in tree_leaves(values) if isinstance(value, Tensor)), None)


def _place(x: Tensor) -> tuple[Any, int]:
    """Where a tensor lies in its memory, and how often this memory has been written to."""
    return (x.storage_offset(), tuple(x.shape)), 0 if x.is_inference() else x._version


def _mark(x: Tensor | None, grid: Grid | None) -> None:
    """Mark the memory of tokens with their grid. A tensor that shares it has the mark too."""
    if x is None or grid is None:
        return
    with contextlib.suppress(RuntimeError, NotImplementedError):  # it has no memory of its own
        place, version = _place(x)
        storage = x.untyped_storage()
        setattr(storage, MARK, getattr(storage, MARK, {}) | {place: (version, grid)})


def _marked_grid(x: Tensor | None) -> Grid | None:
    """The grid that `_mark` noted, unless the memory has been written to since."""
    if x is None:
        return None
    with contextlib.suppress(RuntimeError, NotImplementedError):
        place, version = _place(x)
        marked, grid = getattr(x.untyped_storage(), MARK, {}).get(place, (None, None))
        return grid if marked == version else None
    return None


def only_grid(spec: str, tokens: int) -> Grid:
    """The only grid of so many tokens that a layout accepts. Tracing takes it as a constant.

    Args:
        spec: the `Layout.spec` of the layer.
        tokens: the number of tokens, with the prefix.

    Raises:
        ValueError: there is none, or more than one.
    """
    return _cached_only_grid(spec, int(tokens))


only_grid._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=256)
def _cached_only_grid(spec: str, tokens: int) -> Grid:
    layout = Layout.parse(spec)
    count, fitting = tokens - layout.prefix, []
    for rows in range(1, count + 1):
        if count % rows == 0:
            with contextlib.suppress(ValueError):
                layout.at((rows, count // rows))
                fitting.append((rows, count // rows))
    if len(fitting) == 1:
        return fitting[0]
    found = f"the grids {fitting}" if fitting else f"no grid within {layout.grid}"
    raise ValueError(
        f"tokens: got {tokens}, which fit {found} after {layout.prefix} prefix tokens, and nothing "
        "says which grid this image has; want a call of the whole model, or of its blocks on the "
        "tokens that its embedding returned, or `with patch_grid(model, (rows, columns)):`"
    )
