"""Fits tables to another grid or window, and makes projections relative or shared again."""

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
from .grids import check_sizes
from .module import Converted

__all__ = ["make_relative", "make_shared", "resize_offsets"]

Sizes = int | Sequence[int]


def resize_offsets(
    model: nn.Module, grid: Sizes | None = None, window: Any = None, stretch: bool = True
) -> None:
    """Fit the tables of a layer, or of all layers in a model, to another grid or window, in place.

    Each new offset gets a table entry that is linearly interpolated, axis by axis, between the two
    nearest old offsets. The entry of an old offset is copied exactly, and offsets beyond the old
    ones get the entry of the last one. The entries of prefix tokens stay as they are.

    A `ViT` or `GPT` takes inputs of the new size afterwards, and its learned positions are
    interpolated too. A converted model keeps its own position embedding, which its own library
    resizes. Make the optimizer afterwards, because the parameters are new.

    Args:
        model: Translution, α-Translution or attention with a relative bias, or a module that
            contains such layers.
        grid: the new number of tokens per axis (an int for all axes); None keeps the old one.
        window: the new window, as in Translution; None keeps the old one.
        stretch: if True, offsets scale with the grid, as when the same image has more pixels. If
            False, offsets are counted in tokens, and each old offset keeps its entry.

    Raises:
        ValueError: an argument does not fit a layer (the message names the layer), tables are
            divided over processes, a model has learned positions and stretch is False, or there is
            nothing to resize. The model is unchanged then.
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
        raise ValueError(
            "stretch: got False for learned positions, want True, as they are interpolated over "
            "the whole grid"
        )
    for name, layout in layouts.items():
        for part in layers[name].modules():
            if isinstance(part, RelativeLinear | RelativeBias):
                _resize_table(part, layers[name].layout, layout, stretch)
        layers[name].layout = layout
    for whole, size in zip(models, sizes, strict=True):
        if size is not None:
            _resize_model(whole, size)


def _resized(layer: Attention, grid: Sizes | None, window: Any) -> Layout:
    """The layer's layout with the new grid and window."""
    old = layer.layout
    if any(getattr(part, "shard", None) for part in layer.modules()):
        raise ValueError("model: its tables are divided over processes, want whole ones")
    given = {} if window is None else {"window": window}
    sizes = old.grid if grid is None else check_sizes(grid, len(old.grid))
    return dataclasses.replace(old, grid=sizes, input_grid=sizes, **given)


@torch.no_grad()
def _resize_table(part: Any, old: Layout, new: Layout, stretch: bool) -> None:
    if not old.offset_classes:  # only prefix tokens are queries, so no table entry has an offset
        return
    part.classes = new.classes
    for name, table in list(part.named_parameters(recurse=False)):
        rows = table[: old.offset_classes].unflatten(0, old.axis_classes)
        rows = rows if table.dtype == torch.float64 else rows.float()
        for axis in range(len(old.grid)):
            near, far, part_of_far = (
                t.to(table.device) for t in _interpolation(old, new, axis, stretch)
            )
            weight = part_of_far.to(rows.dtype).view(-1, *(1,) * (rows.ndim - axis - 1))
            rows = torch.lerp(rows.index_select(axis, near), rows.index_select(axis, far), weight)
        rows = rows.flatten(0, len(old.grid) - 1).to(table.dtype)
        whole = torch.cat([rows, table[old.offset_classes :]])
        setattr(part, name, nn.Parameter(whole, requires_grad=table.requires_grad))


def _interpolation(
    old: Layout, new: Layout, axis: int, stretch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Interpolation between the old offset classes of an axis, for each new one.

    Returns:
        the old class before each new one, the old class after it, and the weight of the second,
        from 0 to 1. Both are the same class where the new offset is an old one or lies beyond the
        last.
    """
    have = _offsets(old, axis)
    scale = (old.grid[axis], new.grid[axis]) if stretch else (1, 1)
    at = _offsets(new, axis) * scale[0] / scale[1]  # this order keeps whole numbers exact
    at = at.clamp(have[0], have[-1])
    near = torch.searchsorted(have, at, right=True) - 1
    far = torch.where(have[near] == at, near, (near + 1).clamp(max=len(have) - 1))
    gap = (have[far] - have[near]).clamp(min=1)
    return near, far, (at - have[near]) / gap


def _offsets(layout: Layout, axis: int) -> Tensor:
    """The offset of each class on an axis, in tokens, as float64 (of a bucket: the nearest 0)."""
    starts = [n * layout.dilation[axis] for n in layout.bucket_starts(axis)]
    before = [] if layout.causal else [-n for n in reversed(starts)]
    return torch.tensor([*before, 0, *starts], dtype=torch.float64)


@torch.no_grad()
def _resize_model(model: ViT | GPT, grid: tuple[int, ...]) -> None:
    """Fit the model's configuration and its learned positions [1, *grid, dim] to the new grid."""
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
        if hasattr(block.mixer, "grid"):  # ACmix and convolution use it as their default grid
            block.mixer.grid = grid


def make_relative(layer: nn.Module, relative: str) -> None:
    """Replace shared projections of Translution with tables, in place.

    Every table entry starts as the matrix that was shared, so the outputs stay the same.
    Projections that are relative already stay as they are. Make the optimizer afterwards, because
    the parameters are new.

    Args:
        layer: a Translution layer with 1 to 3 axes, or a module that contains such layers, such as
            a converted model; all of them are changed.
        relative: which of "q", "k", "v" become relative.

    Raises:
        ValueError: there is no such layer; q or k cannot have a table, because the layer has rotary
            positions or norms; or k or v cannot, because groups of heads share it. Nothing has been
            changed then.
    """
    _exchange(layer, relative, table=True)


def make_shared(layer: nn.Module, relative: str) -> None:
    """Replace tables of Translution with one shared matrix each, in place.

    The shared matrix is the mean of all entries of the table, so the outputs change unless all
    entries are equal. Projections that are shared already stay as they are. Make the optimizer
    afterwards, because the parameters are new.

    Args:
        layer: a Translution layer with 1 to 3 axes, or a module that contains such layers, such as
            a converted model; all of them are changed.
        relative: which of "q", "k", "v" become shared.

    Raises:
        ValueError: there is no such layer, or tables are divided over processes. Nothing has been
            changed then.
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
            f"layer: got {type(whole).__name__}, want Translution1d, 2d or 3d, or a module that "
            "contains them"
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
    for model in named.values():  # a saved model must fit its configuration
        if isinstance(model, ViT | GPT):
            options = {m.relative for m in model.modules() if isinstance(m, kinds)}
            if len(options) == 1:
                model.config = dataclasses.replace(model.config, relative=options.pop())


def _sides(layer: Any, relative: str, table: bool) -> list[str]:
    """The projections of `relative` that are not yet as wanted: tables, or shared."""
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
    """A new projection: a table in which every entry is the old matrix, or the mean of a table."""
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
