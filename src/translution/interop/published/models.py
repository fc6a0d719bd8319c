"""The entries of the published Translution code's models, ViT and GPT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...models import GPT, ViT
from ...modules.self_attention import SelfAttention
from .entry import Entry, Options, concatenated, entries, same_names, with_prefix

__all__: list[str] = []

# The published names of the blocks, for each of our mixers.
STEMS = {
    "translution": "translution",
    "alpha": "translution",
    "attention": "transformer",
    "rotary": "transformer",
}


@entries.register(ViT)
def _vit(model: Any, options: Options) -> Iterator[Entry]:
    stem = _stem(model)
    if model.config.pool == "mean":
        raise ValueError(
            "pool: got 'mean', want 'cls' or 'all'; the published mean includes the class token, "
            "which this model does not have"
        )
    if stem == "transformer" and model.positions is None:
        raise ValueError(
            "positions: the published ViT with rotary attention adds learned positions as well, "
            "and this model has none; make it with learned_positions=True"
        )
    if model.config.stem != "patches":
        raise ValueError(f"stem: got {model.config.stem!r}, want 'patches', the published one")
    yield concatenated("cls_token", model.cls_token)
    if model.positions is not None:
        yield _positions(model.cls_token, model.positions)
    parts = model.embed.norm1, model.embed.proj, model.embed.norm2
    for i, part in enumerate(parts, start=1):
        yield from same_names(f"to_patch_embedding.{i}", part)
    yield from _blocks(stem, model, options)
    yield from same_names(f"{stem}.norm", model.norm)
    yield from same_names("mlp_head", model.head)


def _positions(cls_token: Tensor, positions: Tensor) -> Entry:
    """The entry of the learned positions; ours adds that of the class token to the token itself."""
    dim = positions.shape[-1]

    def read(x: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(positions, x[:, 1:].reshape(positions.shape)), (cls_token, x[:, :1])]

    def write() -> Tensor:
        rows = positions.detach().reshape(1, -1, dim)
        return torch.cat([torch.zeros_like(rows[:, :1]), rows], 1)

    return Entry("pos_embedding", (1, 1 + positions.numel() // dim, dim), read, write)


@entries.register(GPT)
def _gpt(model: Any, options: Options) -> Iterator[Entry]:
    stem = _stem(model)
    plain = any(isinstance(block.mixer, SelfAttention) for block in model.blocks)
    if plain and stem == "translution":
        raise ValueError(
            "relative_depth: got a GPT with some blocks of ordinary attention, want all blocks "
            "relative; the published one has no causal mask in those blocks, and ours has"
        )
    if model.config.tie_head:
        raise ValueError("tie_head: got True, want False; the published head has its own weight")
    norms = list(model.norm) if isinstance(model.norm, nn.Sequential) else [model.norm]
    if len(norms) != 2:
        raise ValueError(
            "norm: the published GPT ends with two layer norms, and this model with one; make it "
            "with double_final_norm=True"
        )
    yield concatenated("wte.weight", model.embed.weight)
    if model.positions is not None:
        yield concatenated("wpe.weight", model.positions, shape=model.positions.shape[1:])
    yield from _blocks(stem, model, options)
    yield from same_names(f"{stem}.norm", norms[0])
    yield from same_names("norm", norms[1])
    yield from same_names("output_head", model.head)


def _blocks(stem: str, model: Any, options: Options) -> Iterator[Entry]:
    for i, block in enumerate(model.blocks):
        yield from with_prefix(f"{stem}.layers.{i}", entries(block, options))


def _stem(model: Any) -> str:
    if model.config.mixer not in STEMS:
        raise ValueError(f"mixer: got {model.config.mixer!r}, want one of {list(STEMS)}")
    return STEMS[model.config.mixer]
