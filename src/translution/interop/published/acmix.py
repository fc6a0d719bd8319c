"""The entries of the published ACmix code's layers and models.

Its ResNet has the names of torchvision's ResNet, and its Swin those of Swin's published code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.residual_network import Bottleneck, ResNet
from ...models.swin_transformer import Block, Swin
from ...modules.acmix import ACmix2d
from ...modules.window import WindowACmix2d, WindowAttention2d
from .entry import (
    Entry,
    Options,
    concatenated,
    constant,
    entries,
    linear,
    same_names,
    with_prefix,
)

__all__: list[str] = []


@entries.register(ACmix2d)
def _acmix(layer: Any, options: Options) -> Iterator[Entry]:
    if layer.dilation > 1:
        raise ValueError(f"dilation: got {layer.dilation}, want 1: the published code fails then")
    yield from _convolution_path(layer)
    for i, name in enumerate(("q_proj", "k_proj", "v_proj"), start=1):
        yield from same_names(f"conv{i}", getattr(layer, name))
    weight = layer.position_proj.weight
    yield concatenated("conv_p.weight", weight)
    # it is added to the positions of query and key, of which only the difference is used
    yield Entry(
        "conv_p.bias", (layer.head_dim,), lambda x: [], lambda: weight.new_zeros(layer.head_dim),
        unread="all of it",
    )  # fmt: skip


def _convolution_path(layer: Any) -> Iterator[Entry]:
    """The entries of the convolution path, and the factors α and β of the two paths."""
    path = layer.convolution
    if not path.grouped_order or path.bias is not None or path.shifts is None:
        raise ValueError(
            f"published: {type(layer).__name__} was made without published=True and "
            "learned_shifts=True, want both, as the published convolution path orders its channels "
            "differently"
        )
    yield concatenated("rate1", layer.alpha, shape=(1,))
    yield concatenated("rate2", layer.beta, shape=(1,))
    yield concatenated("fc.weight", path.fc.weight, shape=(*path.fc.weight.shape, 1, 1))
    if path.fc.bias is not None:
        yield concatenated("fc.bias", path.fc.bias)
    yield concatenated("dep_conv.weight", path.shifts)


@entries.register(WindowAttention2d)
def _window(layer: Any, options: Options) -> Iterator[Entry]:
    yield from linear("qkv", layer.q_proj, layer.k_proj, layer.v_proj)
    yield from linear("proj", layer.o_proj)
    size = min(layer.window_size, options.map_size or layer.window_size)
    yield _position_bias(layer.position_bias, layer.window_size, size)
    place = torch.arange(size, device=layer.position_bias.device)
    step = place[:, None] - place + size - 1
    rows = step[:, None, :, None] * (2 * size - 1) + step[None, :, None, :]
    yield constant("relative_position_index", rows.flatten(2).flatten(0, 1))


def _position_bias(bias: Tensor, window: int, size: int) -> Entry:
    """The entry of a window's position bias.

    The window of the published Swin is never larger than the map, and then its table has only the
    offsets of that map. They are in the middle of ours; our other offsets start at zero.
    """
    side, more = 2 * size - 1, window - size
    heads = bias.shape[1]

    def read(x: Tensor) -> list[tuple[Tensor, Tensor]]:
        middle = x.reshape(side, side, heads)
        return [(bias, F.pad(middle, (0, 0, more, more, more, more)).flatten(0, 1))]

    def write() -> Tensor:
        whole = bias.detach().unflatten(0, (2 * window - 1, -1))
        return whole[more : more + side, more : more + side].flatten(0, 1).clone()

    return Entry("relative_position_bias_table", (side * side, heads), read, write)


@entries.register(WindowACmix2d)
def _window_acmix(layer: Any, options: Options) -> Iterator[Entry]:
    yield from _window(layer, options)
    yield from _convolution_path(layer)


@entries.register(Bottleneck)
def _bottleneck(block: Any, options: Options) -> Iterator[Entry]:
    for i in (1, 2, 3):
        middle = getattr(block, f"conv{i}")
        mixed = isinstance(middle, ACmix2d)
        yield from (
            with_prefix(f"conv{i}", entries(middle, options))
            if mixed
            else same_names(f"conv{i}", middle)
        )
        yield from same_names(f"bn{i}", getattr(block, f"norm{i}"))
    yield from same_names("downsample", block.shortcut)


@entries.register(ResNet)
def _resnet(model: Any, options: Options) -> Iterator[Entry]:
    _check_head(model)
    yield from same_names("conv1", model.stem[0])
    yield from same_names("bn1", model.stem[1])
    for s, stage in enumerate(model.stages, start=1):
        for i, block in enumerate(stage):
            yield from with_prefix(f"layer{s}.{i}", entries(block, options))
    yield from same_names("fc", model.head)


@entries.register(Block)
def _swin_block(block: Any, options: Options) -> Iterator[Entry]:
    yield from same_names("norm1", block.norm1)
    yield from with_prefix("attn", entries(block.attention, options))
    yield from same_names("norm2", block.norm2)
    yield from linear("mlp.fc1", block.mlp[0])
    yield from linear("mlp.fc2", block.mlp[2])


@entries.register(Swin)
def _swin(model: Any, options: Options) -> Iterator[Entry]:
    _check_head(model)
    yield from same_names("patch_embed", model.embed)
    sizes = _map_sizes(model, options.image_size)
    if model.positions is not None:
        yield _absolute_positions(model.positions, sizes[0])
    for s, (stage, size) in enumerate(zip(model.stages, sizes, strict=True)):
        blocks = [part for part in stage if isinstance(part, Block)]
        own = dataclasses.replace(options, map_size=size)
        for i, block in enumerate(blocks):
            yield from with_prefix(f"layers.{s}.blocks.{i}", entries(block, own))
            if block.attention.shift and size > model.config.window_size:
                mask = _attention_mask(size, block.attention)
                yield constant(f"layers.{s}.blocks.{i}.attn_mask", mask)
        if s:  # our stages begin with patch merging; the published ones end with it
            yield from linear(f"layers.{s - 1}.downsample.reduction", stage[0].proj)
            yield from same_names(f"layers.{s - 1}.downsample.norm", stage[0].norm)
    yield from same_names("norm", model.norms[3])
    yield from same_names("head", model.head)


def _absolute_positions(positions: Tensor, size: int) -> Entry:
    dim, height, width = positions.shape[1:]
    if (height, width) != (size, size):
        raise ValueError(
            f"absolute_positions: got those of {height}×{width} patches, want {size}×{size}, as "
            "image_size says"
        )
    return Entry(
        "absolute_pos_embed",
        (1, size * size, dim),
        lambda x: [(positions, x.mT.unflatten(2, (size, size)))],
        lambda: positions.detach().flatten(2).mT.clone(memory_format=torch.contiguous_format),
    )


def _map_sizes(model: Any, image_size: int) -> list[int]:
    """The height of each stage's feature map, which must divide as the published code requires."""
    patch, window = model.config.patch_size, model.config.window_size
    sizes = [image_size // (patch * 2**s) for s in range(4)]
    whole_windows = all(size <= window or size % window == 0 for size in sizes)
    if image_size % (patch * 8) or not sizes[3] or not whole_windows:
        raise ValueError(
            f"image_size: got {image_size}, want the size that the published Swin was made for, "
            f"whose maps consist of whole windows of {window} (or are smaller than one)"
        )
    return sizes


def _attention_mask(size: int, attention: WindowAttention2d) -> Tensor:
    """Swin's attention mask [windows, positions, positions].

    It is -100 for two positions that are neighbours only because the map was rolled, else 0.
    """
    like, window = attention.position_bias, attention.window_size
    position = torch.arange(size, device=like.device)
    region = (position >= size - window).long() + (position >= size - attention.shift)
    region = region.unflatten(0, (-1, window))
    regions = (3 * region[:, None, :, None] + region[None, :, None, :]).flatten(2).flatten(0, 1)
    apart = regions[:, :, None] != regions[:, None, :]
    return torch.zeros(apart.shape, dtype=like.dtype, device=like.device).masked_fill(apart, -100.0)


def _check_head(model: Any) -> None:
    if model.features_only:
        raise ValueError("features_only: got True, want False: published models are classifiers")
