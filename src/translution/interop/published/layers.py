"""The entries of the published Translution code's attention layers and blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...models.blocks import Block
from ...modules.alpha import AlphaTranslution1d, AlphaTranslution2d
from ...modules.attention import Attention
from ...modules.positions import rotary_angles
from .entry import Entry, Options, concatenated, constant, entries, same_names, table, with_prefix

__all__: list[str] = []


@entries.register(Attention)
def _attention(layer: Any, options: Options) -> Iterator[Entry]:
    _check(layer, options)
    layout, like = layer.layout, layer.o_proj.weight
    if layout.causal:
        seen = torch.ones(layout.tokens, layout.tokens, dtype=like.dtype, device=like.device).tril()
        yield constant("causal", seen[None, None])
    low_rank = isinstance(layer, AlphaTranslution1d | AlphaTranslution2d)
    yield from _rotations(layer, low_rank)
    yield from _low_rank(layer, options) if low_rank else _projections(layer, options)
    yield from same_names("to_out.0", layer.o_proj)


def _projections(layer: Any, options: Options) -> Iterator[Entry]:
    """One entry for each table, and one for all shared matrices together, named after them."""
    relative = getattr(layer, "relative", "")
    shared = "".join(name for name in "qkv" if name not in relative)
    if shared:
        ours = [getattr(layer, f"{name}_proj").weight for name in shared]
        yield concatenated(f"to_{shared}.weight", *ours)
    for name in relative:
        weight = getattr(layer, f"{name}_proj").weight
        yield _table(f"to_{_published_name(name, options)}.unique_params", weight, name, layer)


def _low_rank(layer: Any, options: Options) -> Iterator[Entry]:
    """Entries of α: the ordinary attention, then the low-rank branch.

    The option `exchanged` applies to the branch only.
    """
    yield concatenated("to_qkv.weight", *(getattr(layer, f"{n}_proj").weight for n in "qkv"))
    for name in "qkv":
        published = _published_name(name, options)
        if hasattr(layer, f"{name}_down"):
            yield from same_names(f"to_{published}1", getattr(layer, f"{name}_down"))
        if name in layer.relative:
            weight = getattr(layer, f"{name}_table").weight
            yield _table(f"to_{published}2.unique_params", weight, name, layer)
    if "v" in layer.relative:
        yield from same_names("to_v3", layer.v_up)


def _published_name(name: str, options: Options) -> str:
    """The published name of the projection that is our q, k or v."""
    return {"q": "k", "k": "q"}.get(name, name) if options.exchanged else name


def _table(published: str, weight: Tensor, name: str, layer: Any) -> Entry:
    """The entry of a table, with its rows in the published order.

    Our rows are the offsets query - key, then three for pairs with the class token: both tokens are
    the class token, only the query is, only the key is. The published tables of k and v have the
    same order. In that of q the offsets are negated, and the last two rows are exchanged.
    """
    layout = dataclasses.replace(layer.layout, prefix_queries=False)
    rows, offsets = torch.arange(layout.classes), layout.offset_classes
    if name == "q":
        rows[:offsets] = rows[:offsets].flip(0)
        rows[offsets + 1 :] = rows[offsets + 1 :].flip(0)
    if layer.layout.prefix_queries:
        rows = rows[offsets : offsets + 2]  # the two kinds of pairs whose query is the class token
    return table(published, weight, rows, layout.classes)


def _rotations(layer: Any, low_rank: bool) -> Iterator[Entry]:
    """Entries of the rotary positions of a layer.

    Published layers with a table for v only and two axes may contain them without using them, so
    the entries are optional there.
    """
    layout, weight = layer.layout, layer.o_proj.weight
    idle = not low_rank and getattr(layer, "relative", "") == "v"
    if idle and layer.position == "rotary":
        raise ValueError(
            "position: got 'rotary' for a table of v, want 'none': the published layer computes a "
            "rotation and never applies it"
        )
    fits = len(layout.grid) == 2 and layer.head_dim % 4 == 0
    if layer.position != "rotary" and not (idle and fits):
        return
    one = weight.new_zeros(1, 1, layout.tokens, layer.head_dim)
    name = "rotary_emb" if len(layout.grid) == 1 else "rope"
    for kind, half in zip(("cos", "sin"), rotary_angles(one, layout), strict=True):
        value = torch.cat([half, half], -1)[layout.prefix :]
        size = (1, *layout.grid, -1) if len(layout.grid) > 1 else (1, 1, *layout.grid, -1)
        entry = constant(f"{name}.{kind}_cached", value.to(weight.dtype).reshape(size))
        unread = "all of it" if idle else ""
        yield dataclasses.replace(entry, optional=idle, unread=unread)


@entries.register(nn.Sequential)
def _norm_and_attention(pair: nn.Sequential, options: Options) -> Iterator[Entry]:
    fits = [isinstance(m, k) for m, k in zip(pair, (nn.LayerNorm, Attention), strict=False)]
    if fits != [True, True] or len(pair) != 2:
        kinds = [type(module).__name__ for module in pair]
        raise ValueError(f"module: got nn.Sequential of {kinds}, want a LayerNorm and an attention")
    yield from same_names("norm", pair[0])
    yield from entries(pair[1], options)


@entries.register(Block)
def _block(block: Any, options: Options) -> Iterator[Entry]:
    yield from with_prefix("0", entries(nn.Sequential(block.norm1, block.mixer), options))
    for name, module in (("0", block.norm2), ("1", block.mlp[0]), ("4", block.mlp[3])):
        yield from same_names(f"1.net.{name}", module)


def _check(layer: Any, options: Options) -> None:
    """Raise a ValueError for options that the published code does not have."""
    layout, axes = layer.layout, len(layer.layout.grid)
    most = 0 if axes == 1 else 1
    refused = {
        "grid": (axes == 3 or (axes == 1 and not layout.causal), "two axes, or a causal one"),
        "window": (layout.window is not None, "none"),
        "dilation": (any(step > 1 for step in layout.dilation), "1"),
        "buckets": (layout.buckets is not None, "none"),
        "prefix": (layout.prefix > most, f"at most {most} on {axes} axes"),
        "position": (getattr(layer, "position", "") == "bias", "'none' or 'rotary'"),
        "qkv_bias": (_has_bias(layer), "False"),
        "kv_heads": (layer.kv_heads < layer.heads, "None"),
        "heads": (layer.heads == 1 and layer.head_dim == layer.dim, "another number: the published "
                  "code has no output projection for one head of head_dim = dim"),
        "shard": (_is_divided(layer), "a whole table (divide it after loading)"),
    }  # fmt: skip
    for name, (wrong, wanted) in refused.items():
        if wrong:
            got = f"{type(layer).__name__}({layer.extra_repr()})"
            raise ValueError(f"{name}: {got} has no published counterpart, want {wanted}")
    if options.exchanged and layout.causal and {"q", "k"} <= set(getattr(layer, "relative", "")):
        raise ValueError(
            "exchanged: got True for a causal layer, want False. Before 2025-12-19 (e35f07d) "
            "the 1-D code computed something else from entries of these names (at times scores "
            "from the key token alone), which no layer here computes"
        )


def _has_bias(layer: Any) -> bool:
    names = [f"{n}_{kind}" for n in "qkv" for kind in ("proj", "table")]
    return any(getattr(getattr(layer, name, None), "bias", None) is not None for name in names)


def _is_divided(layer: nn.Module) -> bool:
    return any(getattr(module, "shard", None) is not None for module in layer.modules())
