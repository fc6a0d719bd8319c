"""The whole models of the published Translution code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...models import GPT, ViT
from ...modules.attention import SelfAttention
from .entries import Entry, How, entries, joined, under, whole

__all__: list[str] = []

# What the published models call their blocks, by the mixer of ours.
STEMS = {
    "translution": "translution",
    "alpha": "translution",
    "attention": "transformer",
    "rotary": "transformer",
}


@entries.register(ViT)
def _vit(model: Any, how: How) -> Iterator[Entry]:
    stem = _stem(model)
    if model.config.pool != "cls":
        raise ValueError(
            f"pool: got {model.config.pool!r}, want 'cls'; the published mean is over the class "
            "token as well, which this model does not have"
        )
    if stem == "transformer" and model.positions is None:
        raise ValueError(
            "positions: the published ViT with rotary attention adds learned positions as well, "
            "and this model has none; make it with learned_positions=True"
        )
    yield joined("cls_token", model.cls_token)
    if model.positions is not None:
        yield _positions(model.cls_token, model.positions)
    parts = model.embed.norm1, model.embed.proj, model.embed.norm2
    for i, part in enumerate(parts, start=1):
        yield from whole(f"to_patch_embedding.{i}", part)
    yield from _blocks(stem, model, how)
    yield from whole(f"{stem}.norm", model.norm)
    yield from whole("mlp_head", model.head)


def _positions(cls_token: Tensor, positions: Tensor) -> Entry:
    """The class token has a position there, which is here a part of it."""
    dim = positions.shape[-1]

    def read(x: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(positions, x[:, 1:].reshape(positions.shape)), (cls_token, x[:, :1])]

    def write() -> Tensor:
        places = positions.detach().reshape(1, -1, dim)
        return torch.cat([torch.zeros_like(places[:, :1]), places], 1)

    return Entry("pos_embedding", (1, 1 + positions.numel() // dim, dim), read, write)


@entries.register(GPT)
def _gpt(model: Any, how: How) -> Iterator[Entry]:
    stem = _stem(model)
    plain = any(isinstance(block.mixer, SelfAttention) for block in model.blocks)
    if plain and stem == "translution":
        raise ValueError(
            "relative_depth: got a hybrid GPT; the plain attention of the published ones has no "
            "causal mask, so that their weights expect to see the future and ours can't let them"
        )
    norms = list(model.norm) if isinstance(model.norm, nn.Sequential) else [model.norm]
    if len(norms) != 2:
        raise ValueError(
            "norm: the published GPT ends in two layer norms, which no single one equals, and "
            "this model in one; make it with double_final_norm=True"
        )
    yield joined("wte.weight", model.embed.weight)
    if model.positions is not None:
        yield joined("wpe.weight", model.positions, shape=model.positions.shape[1:])
    yield from _blocks(stem, model, how)
    yield from whole(f"{stem}.norm", norms[0])
    yield from whole("norm", norms[1])
    yield from whole("output_head", model.head)


def _blocks(stem: str, model: Any, how: How) -> Iterator[Entry]:
    for i, block in enumerate(model.blocks):
        yield from under(f"{stem}.layers.{i}", entries(block, how))


def _stem(model: Any) -> str:
    if model.config.mixer not in STEMS:
        raise ValueError(f"mixer: got {model.config.mixer!r}, want one of {list(STEMS)}")
    return STEMS[model.config.mixer]
