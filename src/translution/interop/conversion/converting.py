"""Translution in the place of a trained model's self-attention, with the same outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...layouts import Layout
from ...modules.alpha import AlphaTranslution1d, AlphaTranslution2d
from ...modules.attention import check_relative
from ...modules.projections import projection
from ...modules.translution import Translution1d, Translution2d
from .geometry import embedding_of, geometry_of
from .module import Converted, Patches, rotated
from .sources import Family, Source, family_of

__all__ = ["Change", "Plan", "convert"]

KINDS = {
    ("translution", 1): Translution1d,
    ("translution", 2): Translution2d,
    ("alpha", 1): AlphaTranslution1d,
    ("alpha", 2): AlphaTranslution2d,
}

Known = tuple[str, nn.Module, Family | None]  # a layer's name; no family: it is converted already


@dataclass(frozen=True)
class Change:
    """One layer of a `Plan`: its name in the model, the class that is replaced, the layout, and
    parameters and bytes before and after."""

    name: str
    replaced: str
    layout: Layout
    parameters: tuple[int, int]
    bytes: tuple[int, int]


class Aim(NamedTuple):
    """What layers become; the arguments of `convert`, made whole."""

    to: str
    relative: str
    rank: int
    grid: tuple[int, ...]
    prefix: int
    buckets: Any
    dry_run: bool


@dataclass(frozen=True)
class Plan:
    """What `convert` changes; printed, a table."""

    to: str
    relative: str
    changes: tuple[Change, ...]

    def __str__(self) -> str:
        lines = [f"to {self.to}, relative {self.relative}"]
        for c in self.changes:
            sizes = "×".join(map(str, c.layout.grid))
            some = "" if c.layout.buckets is None else f", buckets {c.layout.buckets}"
            lines.append(
                f"{c.name} ({c.replaced}): grid {sizes}{some}, prefix {c.layout.prefix}, "
                f"{c.layout.classes} classes; parameters {c.parameters[0]:,} -> "
                f"{c.parameters[1]:,}, {c.bytes[0] / 2**20:,.1f} -> {c.bytes[1] / 2**20:,.1f} MiB"
            )
        more = sum(c.bytes[1] - c.bytes[0] for c in self.changes)
        lines.append(f"{len(self.changes)} layers, {more / 2**20:,.1f} MiB more in all")
        return "\n".join(lines)


def convert(
    model: nn.Module,
    layers: int | Sequence[int | str] | None = None,
    to: str = "translution",
    relative: str = "v",
    rank: int = 8,
    grid: int | Sequence[int] | None = None,
    prefix: int | None = None,
    buckets: Any = None,
    dry_run: bool = False,
) -> Plan:
    """Put Translution in the place of a model's self-attention, in place.

    Every matrix of a table starts as the pretrained one, and α's tables start at zero, so that the
    model gives the outputs it gave, to rounding, until it is trained further. Known are ViT, DeiT,
    DINOv2 (with registers), BERT, RoBERTa, ELECTRA, GPT-2, Llama, Mistral, Qwen 2 and 3 of
    transformers; timm's VisionTransformer; and torch.nn.MultiheadAttention, also within
    TransformerEncoderLayer. What is not self-attention stays as it is, where that can be seen: a
    bare MultiheadAttention only shows when it is called, so leave out by `layers` those that look
    across (what was converted then refuses the call, with its name). The model's device, dtype,
    mode and output projections stay too; new tables ask for gradients.

    To load weights that were saved after it, build the host model, convert it with the same
    arguments, then load_state_dict; transformers' from_pretrained does not know the new layers. An
    optimizer is made after it. Texts are generated with a DynamicCache (transformers' default),
    which then holds the inputs where a key or value is relative; other caches are refused when they
    come.

    Args:
        model: holds the attention.
        layers: which: the first so many, or some by their number or name; None is all. Numbers
            count also the layers that are converted already, which stay as they are: asked for by
            number or name they are an error, and so is asking for nothing else.
        to: "translution", or "alpha" (the pretrained attention and a relative branch of low rank).
        relative: which of "q", "k", "v" become relative.
        rank: of α's branch, per head.
        grid: tokens per axis that the tables are made for, prefix not counted; by default the
            model's patches, or its most positions. MultiheadAttention wants it given. Smaller
            inputs are fine, larger ones an error (but for `buckets`): see `resize_offsets`. Fewer
            than the patches of a model that takes one size of images are an error here.
        prefix: tokens without a place, in front; by default what the model says (class,
            distillation and register tokens; another number is an error), for texts 0.
        buckets: as in Translution. By default none, but 8 for texts without a `grid`, so that
            tables are small and inputs of any length. With buckets=n and grid=n + 1, offsets up to
            n are exact and all beyond share a matrix.
        dry_run: change nothing.

    Returns:
        what is changed, layer by layer.

    Raises:
        ValueError: an argument that doesn't fit; or, with its name, a layer that can't be converted
            exactly and the reason. Nothing has been changed then. Among the reasons: a q or k with
            a norm can't be relative in Translution (the norm would act on each pair; α can, as can
            relative "v"), one with rotary positions can with a `grid` and no buckets: its table
            then starts with each offset's rotation in it, and expects positions 0, 1, 2, ...
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: got {type(model).__name__}, want an nn.Module")
    if to not in ("translution", "alpha"):
        raise ValueError(f"to: got {to!r}, want 'translution' or 'alpha'")
    relative = _wanted(relative)
    chosen = _choose(model, layers)
    embedding = embedding_of(model)
    geometry = geometry_of(model, embedding, grid, prefix, buckets)
    aim = Aim(to, relative, rank, *geometry, dry_run)
    made: dict[int, Converted] = {}
    changes = []
    for name, module, family in chosen:
        try:
            if id(module) not in made:
                made[id(module)] = _make(model, module, family, aim)
                changes.append(_change(name, module, made[id(module)]))
        except ValueError as error:
            raise ValueError(f"{name} ({type(module).__name__}): {error}") from None
    if not dry_run:
        for name, module, _ in chosen:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, made[id(module)])
        for change, new in zip(changes, made.values(), strict=True):
            new.name = change.name
            new.family.placed(new)
        for part in model.modules():  # its nested path reads the weights of what was there
            if isinstance(part, nn.TransformerEncoder):
                part.use_nested_tensor = part.enable_nested_tensor = False
        if embedding is not None:
            patches = Patches()
            embedding.register_forward_hook(patches.see)
            for new in made.values():
                new.patches = patches
    return Plan(to, relative, tuple(changes))


def _wanted(relative: Any) -> str:
    """One or more of "qkv", in that order."""
    try:
        found = check_relative(relative)
    except ValueError:
        found = ""
    if not found:
        raise ValueError(f"relative: got {relative!r}, want one or more of 'qkv', such as 'kv'")
    return found


def _choose(model: nn.Module, layers: Any) -> list[tuple[str, nn.Module, Family]]:
    """The layers to convert, under every name that they have. Those converted already count, so
    that a layer keeps its number, but are not converted again."""
    known: list[Known] = []
    for name, module in model.named_modules(remove_duplicate=False):
        family = family_of(module)
        across = name.endswith("multihead_attn")  # of nn.TransformerDecoderLayer
        across |= bool(getattr(module, "is_cross_attention", False))
        if isinstance(module, Converted) or (family is not None and not across):
            if not name:
                raise ValueError("model: is the attention itself, want a module that holds it")
            known.append((name, module, family))
    if not known:
        raise ValueError(
            f"model: got {type(model).__name__}, want one with self-attention that is known "
            "(help(convert) lists the families)"
        )
    chosen = _named(model, known, layers)
    fresh = [(name, module, family) for name, module, family in chosen if family is not None]
    if not fresh:
        raise ValueError(
            f"layers: got {layers}, but all that this asks for ({len(chosen)} of {len(known)} "
            "layers) is converted already; make_relative, make_shared and resize_offsets change it"
        )
    return fresh


def _named(model: nn.Module, known: list[Known], layers: Any) -> list[Known]:
    """Those that `layers` says, of all that are known."""
    names = [name for name, _, _ in known]
    if layers is None:
        return known
    if isinstance(layers, int) and not isinstance(layers, bool):
        if not 1 <= layers <= len(known):
            raise ValueError(f"layers: got {layers}, want 1 to {len(known)}")
        found = {id(module) for _, module, _ in known[:layers]}
        return [one for one in known if id(one[1]) in found]
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
        raise ValueError(f"layers: got {layers!r}, want an int, or a list of numbers and names")
    named, found = dict(model.named_modules(remove_duplicate=False)), set()
    for layer in layers:
        whole = isinstance(layer, int) and -len(known) <= layer < len(known)
        if layer in names or whole:
            name, module, family = known[layer if whole else names.index(layer)]
            if family is None:
                raise ValueError(
                    f"layers: got {layer!r}, but {name} is converted already; make_relative, "
                    "make_shared and resize_offsets change it"
                )
            found.add(id(module))
        else:
            other = type(named.get(layer)).__name__ if layer in named else ""
            told = f" (a {other}, which is no self-attention that is known)" if other else ""
            raise ValueError(
                f"layers: got {layer!r}{told}, want 0 to {len(known) - 1}, or of {names}"
            )
    return [one for one in known if id(one[1]) in found]


def _make(model: nn.Module, module: nn.Module, family: Family, aim: Aim) -> Converted:
    """The replacement of one module, but for the patches; in a dry run without memory."""
    source = family.describe(module)
    if source.causal and aim.prefix:
        raise ValueError("prefix: a causal layer has none here, want prefix=0")
    tables = aim.relative if aim.to == "translution" else ""  # the projections that become tables
    for name in tables:
        if name in source.norms:
            raise ValueError(
                f"relative: {name!r} has a norm behind its projection, which would act on each "
                "pair; want relative 'v', or to='alpha'"
            )
    turns = None
    if source.rotary and set(tables) & set("qk"):
        turns = _turns(model, aim)
    weight = source.matrices["q"][0]
    more: dict[str, Any] = {"relative": ""}  # tables are put in below
    if aim.to == "alpha":
        more = {"relative": aim.relative, "rank": aim.rank}
    grid: Any = aim.grid if len(aim.grid) == 2 else aim.grid[0]
    with torch.device("meta") if aim.dry_run else weight.device:
        layer: Any = KINDS[aim.to, len(aim.grid)](
            source.dim, grid, heads=source.heads, head_dim=source.head_dim,
            causal=source.causal, prefix=aim.prefix, buckets=aim.buckets,
            dropout=source.dropout, **more,
        ).to(weight.dtype)  # fmt: skip
        trained = any(p.requires_grad for p in module.parameters())
        for name, (matrix, bias) in source.matrices.items():
            if name in tables:
                if name != "q":  # of grouped heads each has its own
                    matrix = _each(matrix, source)
                    bias = None if bias is None else _each(bias, source)
                side = _filled_projection(matrix.T, bias, layer.layout.classes, aim.dry_run)
            else:
                side = _filled_projection(matrix, bias, None, aim.dry_run).requires_grad_(trained)
            setattr(layer, f"{name}_proj", side)
    turned = source.rotary and turns is None
    layer.relative, layer.position = aim.relative, "rotary" if turned else "none"
    layer.scale = source.scale
    layer.train(module.training).o_proj = source.out  # what is the host's keeps its mode
    if aim.to == "alpha":
        _still(layer)
    if turns is not None and not aim.dry_run:
        _turn(layer, *turns)
    made = Converted(layer, source, family, family.arguments(module))
    made.training = module.training
    return made


@torch.no_grad()
def _filled_projection(
    matrix: Tensor, bias: Tensor | None, classes: int | None, dry_run: bool
) -> Any:
    """A projection of this matrix: nn.Linear's [out, in], or for a table that each class starts
    with, [in, out]."""
    inner, outer = matrix.shape if classes is not None else matrix.shape[::-1]
    made = projection(inner, outer, classes, bias is not None).to(matrix.dtype)
    if not dry_run:
        made.weight.copy_(matrix)
        if made.bias is not None and bias is not None:
            made.bias.copy_(bias)
    return made


def _each(t: Tensor, source: Source) -> Tensor:
    """The rows of grouped heads, for every query head."""
    heads = t.unflatten(0, (source.kv_heads or source.heads, -1))
    return heads.repeat_interleave(source.heads // len(heads), 0).flatten(0, 1)


@torch.no_grad()
def _still(layer: Any) -> None:
    """α as the attention that it holds: its branches add zero, and because the two are averaged,
    the other counts double, in the scale (a norm would undo it in W_q) and in W_v."""
    if layer.relative_scores:
        (layer.q_table if "q" in layer.relative else layer.k_table).weight.zero_()
        layer.scale *= 2
    if "v" in layer.relative:
        layer.v_table.weight.zero_()
        for p in layer.v_proj.parameters():
            p.mul_(2)


def _turns(model: nn.Module, aim: Aim) -> tuple[Tensor, float]:
    """The rates and the factor of a model's rotary positions, where tables can contain them."""
    if aim.buckets is not None:
        raise ValueError(
            "relative: q and k have rotary positions, of which a table needs every offset; want "
            "grid= (the longest input) and no buckets, or relative 'v', or to='alpha'"
        )
    found: list[Any] = [m for m in model.modules() if hasattr(m, "inv_freq")]
    kinds = {getattr(m, "rope_type", "default") for m in found}
    if len(found) != 1 or kinds & {"dynamic", "longrope"}:
        raise ValueError(
            f"relative: got {len(found)} rotary embeddings of the types {sorted(kinds)}, want one "
            "whose rates don't depend on the input; or relative 'v', or to='alpha'"
        )
    return found[0].inv_freq, float(getattr(found[0], "attention_scaling", 1.0))


@torch.no_grad()
def _turn(layer: Any, rates: Tensor, factor: float) -> None:
    """Rotary positions into a table: (R_i q)·(R_j k) = (R_{i-j} q)·k, and so for k the other
    way."""
    name = "q" if "q" in layer.relative else "k"
    table = getattr(layer, f"{name}_proj")
    first = 0 if layer.layout.causal else 1 - layer.layout.grid[0]
    offset = torch.arange(first, layer.layout.grid[0], device=rates.device, dtype=torch.float64)
    angle = (offset if name == "q" else -offset)[:, None] * rates.double()
    angle = torch.cat([angle, angle], -1).to(table.weight.device)
    for p in table.parameters():
        cos, sin = (t.view(len(t), *(1,) * (p.ndim - 1), -1) for t in (angle.cos(), angle.sin()))
        heads = p.double().unflatten(-1, (layer.heads, -1))
        p.copy_((rotated(heads, cos, sin) * factor**2).flatten(-2))


def _change(name: str, module: nn.Module, made: Converted) -> Change:
    def size(m: nn.Module) -> tuple[int, int]:
        each = list(m.parameters())
        return sum(p.numel() for p in each), sum(p.numel() * p.element_size() for p in each)

    before, after = size(module), size(made)
    return Change(
        name, type(module).__name__, made.layer.layout,
        (before[0], after[0]), (before[1], after[1]),
    )  # fmt: skip
