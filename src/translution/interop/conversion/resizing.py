"""The same tables for another grid, and projections that become relative or shared again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layouts import Layout
from ...models.language_model import GPT
from ...models.vision_transformer import ViT
from ...modules.attention import Attention, check_relative
from ...modules.positions import RelativeBias
from ...modules.projections import RelativeLinear, projection
from ...modules.translution import Translution1d, Translution2d, Translution3d
from .module import Converted

__all__ = ["check_sizes", "make_relative", "make_shared", "resize_offsets"]

Sizes = int | Sequence[int]


def resize_offsets(
    model: nn.Module, grid: Sizes | None = None, window: Any = None, stretch: bool = True
) -> None:
    """Fit the tables of a layer, or of all layers in a model, to another grid or window, in place.

    A new offset takes the entries of the old one at the same place: interpolated between its
    neighbours, axis by axis, exact where they coincide, and the last one beyond. Prefix classes
    stay as they are. A `ViT` or `GPT` then takes inputs of that size; its learned positions are
    interpolated over the image or text. A converted model resizes positions of its own in its own
    ways. Parameters are new ones: an optimizer is made after it.

    Args:
        model: Translution, α-Translution or attention with a relative bias, or what holds them.
        grid: tokens per axis from now on (an int for all axes); None leaves it.
        window: the window from now on, as in Translution; None leaves it.
        stretch: offsets are shares of the grid: an image of more pixels is the same image. False:
            offsets are counted in tokens, and known ones keep their entries.

    Raises:
        ValueError: an argument that doesn't fit (naming the layer), tables divided over processes,
            learned positions with stretch=False, or nothing to resize. Nothing has been changed
            then.
    """
    if grid is None and window is None:
        raise ValueError("grid: got None, want tokens per axis (or a window)")
    named = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    layers = {name: m for name, m in named.items() if isinstance(m, Attention)}
    models = [m for m in named.values() if isinstance(m, ViT | GPT)]
    if not layers and not models:
        raise ValueError(f"model: got {type(model).__name__}, want one whose layers have a layout")
    layouts = {}
    for name, layer in layers.items():
        try:
            layouts[name] = _resized(layer, grid, window)
        except ValueError as error:
            raise ValueError(f"{name or type(layer).__name__}: {error}") from None
    sizes = [
        None if grid is None else check_sizes(grid, 2 if isinstance(m, ViT) else 1) for m in models
    ]
    if not stretch and grid is not None and any(m.positions is not None for m in models):
        raise ValueError("stretch: got False for learned positions, which go on over the whole")
    for name, layout in layouts.items():
        for part in layers[name].modules():
            if isinstance(part, RelativeLinear | RelativeBias):
                _resize_table(part, layers[name].layout, layout, stretch)
        layers[name].layout = layout
    for whole, size in zip(models, sizes, strict=True):
        if size is not None:
            _resize_model(whole, size)


def check_sizes(grid: Any, axes: int) -> tuple[int, ...]:
    """One size per axis, of one for all or a sequence."""
    sizes = tuple(grid) if isinstance(grid, Sequence) else (grid,) * axes
    fine = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in sizes)
    if len(sizes) != axes or not fine:
        raise ValueError(f"grid: got {grid!r}, want {axes} ints of at least 1 (or one for all)")
    return sizes


def _resized(layer: Attention, grid: Sizes | None, window: Any) -> Layout:
    """The layer's new layout."""
    old = layer.layout
    if any(getattr(part, "shard", None) for part in layer.modules()):
        raise ValueError("model: its tables are divided over processes, want whole ones")
    given = {} if window is None else {"window": window}
    sizes = old.grid if grid is None else check_sizes(grid, len(old.grid))
    return dataclasses.replace(old, grid=sizes, input_grid=sizes, **given)


@torch.no_grad()
def _resize_table(part: Any, old: Layout, new: Layout, stretch: bool) -> None:
    if not old.offset_classes:  # the prefix alone asks
        return
    part.classes = new.classes
    for name, table in list(part.named_parameters(recurse=False)):
        rows = table[: old.offset_classes].unflatten(0, old.axis_classes)
        rows = rows if table.dtype == torch.float64 else rows.float()
        for axis in range(len(old.grid)):
            near, far, share = (t.to(table.device) for t in _between(old, new, axis, stretch))
            share = share.to(rows.dtype).view(-1, *(1,) * (rows.ndim - axis - 1))
            rows = torch.lerp(rows.index_select(axis, near), rows.index_select(axis, far), share)
        rows = rows.flatten(0, len(old.grid) - 1).to(table.dtype)
        whole = torch.cat([rows, table[old.offset_classes :]])
        setattr(part, name, nn.Parameter(whole, requires_grad=table.requires_grad))


def _between(old: Layout, new: Layout, axis: int, stretch: bool) -> tuple[Tensor, Tensor, Tensor]:
    """For each new class on this axis the two old ones it lies between, and the share of the
    second; the same class twice where it coincides with one or lies beyond the last."""
    have = _offsets(old, axis)
    scale = (old.grid[axis], new.grid[axis]) if stretch else (1, 1)
    at = _offsets(new, axis) * scale[0] / scale[1]  # a whole number stays one
    at = at.clamp(have[0], have[-1])
    near = torch.searchsorted(have, at, right=True) - 1
    far = torch.where(have[near] == at, near, (near + 1).clamp(max=len(have) - 1))
    gap = (have[far] - have[near]).clamp(min=1)
    return near, far, (at - have[near]) / gap


def _offsets(layout: Layout, axis: int) -> Tensor:
    """float64: the offset of each class on an axis, in tokens; of a bucket that nearest to 0."""
    starts = [n * layout.dilation[axis] for n in layout.bucket_starts(axis)]
    before = [] if layout.causal else [-n for n in reversed(starts)]
    return torch.tensor([*before, 0, *starts], dtype=torch.float64)


@torch.no_grad()
def _resize_model(model: ViT | GPT, grid: tuple[int, ...]) -> None:
    """The model's own idea of its size, and its learned positions [1, *grid, dim]."""
    if model.positions is not None and tuple(model.positions.shape[1:-1]) != grid:
        kept = model.positions
        wide = kept if kept.dtype == torch.float64 else kept.float()
        how = "bicubic" if len(grid) == 2 else "linear"
        wide = F.interpolate(wide.movedim(-1, 1), grid, mode=how, align_corners=False)
        made = wide.movedim(1, -1).to(kept.dtype).contiguous()
        model.positions = nn.Parameter(made, requires_grad=kept.requires_grad)
    if isinstance(model, GPT):
        model.config = dataclasses.replace(model.config, context=grid[0])
        return
    pixels = tuple(n * p for n, p in zip(grid, model.config.patch_size, strict=True))
    model.config = dataclasses.replace(model.config, image_size=pixels)
    for block in model.blocks:
        if hasattr(block.mixer, "grid"):  # of ACmix and convolution: a default
            block.mixer.grid = grid


def make_relative(layer: nn.Module, relative: str) -> None:
    """Give shared projections of Translution a table, in place: every entry is the matrix that was
    shared, so the outputs stay. What is relative already stays. Parameters are new ones: an
    optimizer is made after it.

    Args:
        layer: Translution on 1 to 3 axes, or what holds some, as a converted model or a part of
            it: then all of them.
        relative: which of "q", "k", "v".

    Raises:
        ValueError: no such layer; or q or k of one with rotary positions or norms, or a k or v that
            groups of heads share. Nothing has been changed then.
    """
    _exchange(layer, relative, table=True)


def make_shared(layer: nn.Module, relative: str) -> None:
    """Give tables of Translution up, in place: the mean of all entries is shared. What is shared
    already stays. Parameters are new ones: an optimizer is made after it.

    Args:
        layer: Translution on 1 to 3 axes, or what holds some, as a converted model or a part of
            it: then all of them.
        relative: which of "q", "k", "v".

    Raises:
        ValueError: no such layer, or tables divided over processes. Nothing has been changed then.
    """
    _exchange(layer, relative, table=False)


@torch.no_grad()
def _exchange(whole: Any, relative: str, table: bool) -> None:
    relative = check_relative(relative)
    named = dict(whole.named_modules()) if isinstance(whole, nn.Module) else {}
    kinds = (Translution1d, Translution2d, Translution3d)
    layers = {name: m for name, m in named.items() if isinstance(m, kinds)}
    if not layers:
        raise ValueError(
            f"layer: got {type(whole).__name__}, want Translution1d, 2d or 3d, or what holds them"
        )
    normed = {id(m.layer): set(m.norms) for m in named.values() if isinstance(m, Converted)}
    for name, layer in layers.items():
        try:
            _check_exchange(layer, relative, table, normed.get(id(layer), set()))
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name else str(error)) from None
    for layer in layers.values():
        for side in _sides(layer, relative, table):
            setattr(layer, f"{side}_proj", _exchanged(layer, side, table))
        kept = set(layer.relative)
        kept = kept | set(relative) if table else kept - set(relative)
        layer.relative = check_relative("".join(kept))
    for model in named.values():  # the model's own idea of it, so that what is saved fits
        if isinstance(model, ViT | GPT):
            found = {m.relative for m in model.modules() if isinstance(m, kinds)}
            if len(found) == 1:
                model.config = dataclasses.replace(model.config, relative=found.pop())


def _sides(layer: Any, relative: str, table: bool) -> list[str]:
    """The projections that change."""
    return [name for name in relative if (name in layer.relative) is not table]


def _check_exchange(layer: Any, relative: str, table: bool, normed: set[str]) -> None:
    if table and layer.position == "rotary" and set(relative) & set("qk"):
        raise ValueError(f"relative: got {relative!r}, but q and k have rotary positions")
    if table and set(relative) & normed:
        raise ValueError(f"relative: got {relative!r}, but q and k have norms")
    for name in _sides(layer, relative, table):
        old = getattr(layer, f"{name}_proj")
        if getattr(old, "shard", None) is not None:
            raise ValueError("layer: its tables are divided over processes, want whole ones")
        if old.out_features != layer.heads * layer.head_dim:
            raise ValueError(f"relative: {name!r} is shared by groups of heads, want one per head")


def _exchanged(layer: Any, side: str, table: bool) -> Any:
    """The projection with a table of its matrix, or with the mean of its table."""
    old = getattr(layer, f"{side}_proj")
    classes = layer.layout.classes if table else None
    with old.weight.device:
        new = projection(old.in_features, old.out_features, classes, old.bias is not None)
        new = new.to(old.weight.dtype)
    if table:
        new.weight.copy_(old.weight.T)
    else:
        new.weight.copy_(old.weight.mean(0, dtype=torch.float64).T)
    if new.bias is not None and old.bias is not None:
        new.bias.copy_(old.bias if table else old.bias.mean(0, dtype=torch.float64))
    return new.requires_grad_(old.weight.requires_grad)
