"""Replaces the self-attention of a trained model with Translution, without changing its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from .grids import follow_patches
from .module import Converted
from .rotary import put_rotation_into_table, rotary_frequencies
from .sources import Family, Source, family_of

__all__ = ["KINDS", "Change", "Plan", "attach", "convert"]

KINDS: dict[tuple[str, int], Any] = {
    ("translution", 1): Translution1d,
    ("translution", 2): Translution2d,
    ("alpha", 1): AlphaTranslution1d,
    ("alpha", 2): AlphaTranslution2d,
}
"""The class of a new layer, by the argument `to` of `convert` and the number of axes."""

Candidate = tuple[str, nn.Module, Family | None]
"""A layer's name, the layer, and its family; the family of a converted layer is None."""


@dataclass(frozen=True)
class Change:
    """One layer of a `Plan`.

    Attributes:
        name: the layer's name in the model.
        replaced: the name of the Python class that is replaced.
        layout: the `Layout` of the new layer.
        parameters: the number of parameters before and after.
        bytes: the bytes of these parameters before and after.
    """

    name: str
    replaced: str
    layout: Layout
    parameters: tuple[int, int]
    bytes: tuple[int, int]


class Target(NamedTuple):
    """The kind of layer to convert to: the arguments of `convert`, with all defaults filled in."""

    to: str
    relative: str
    rank: int
    grid: tuple[int, ...]
    prefix: int
    buckets: Any
    dry_run: bool


@dataclass(frozen=True)
class Plan:
    """The changes that `convert` makes. `str(plan)` has one line per layer.

    Attributes:
        to: "translution" or "alpha".
        relative: the projections that become relative, some of "qkv".
        changes: one `Change` per layer.
    """

    to: str
    relative: str
    changes: tuple[Change, ...]

    def __str__(self) -> str:
        lines = [f"to {self.to}, relative {self.relative}"]
        for c in self.changes:
            sizes = "×".join(map(str, c.layout.grid))
            buckets = "" if c.layout.buckets is None else f", buckets {c.layout.buckets}"
            lines.append(
                f"{c.name} ({c.replaced}): grid {sizes}{buckets}, prefix {c.layout.prefix}, "
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
    """Replace a model's self-attention with Translution, in place.

    Every matrix of a new table starts as a copy of the pretrained matrix, and α's tables start at
    zero. The model's outputs therefore stay the same, to rounding, until it is trained further. Its
    device, dtype, training mode and output projections stay too. New tables require gradients.

    These models can be converted: ViT, DeiT, DINOv2 (with registers), BERT, RoBERTa, ELECTRA,
    GPT-2, Llama, Mistral, Qwen 2 and 3 of transformers; timm's VisionTransformer; and
    torch.nn.MultiheadAttention, also within TransformerEncoderLayer. Cross-attention is left as it
    is where the model shows that it is cross-attention. A bare MultiheadAttention does not show it
    before it is called, so leave cross-attention out with `layers`; a layer that was converted by
    mistake raises a ValueError with its name when it is called.

    Make the optimizer after the conversion, because the parameters are new. `save_converted` and
    `load_converted` save and load the converted model; save_pretrained and from_pretrained of
    transformers cannot, because they cannot build the new layers. `translution export` exports a
    folder of `save_converted`, and `translution.interop.export.portable` the model itself, which
    torch.onnx.export and torch.export cannot export without it. Text is generated with a
    DynamicCache, the default of transformers, which holds a layer's inputs where its key or value
    is relative. Other caches raise a ValueError when they are passed.

    Args:
        model: the model that contains the attention layers.
        layers: the layers to convert: an int n for the first n, or a list of numbers and names.
            None converts all. Layers that are converted already are counted too and stay as they
            are. It is an error to name one of them, or to select no other layer.
        to: "translution"; or "alpha", the pretrained attention with a relative branch of low rank.
        relative: which of "q", "k", "v" become relative.
        rank: the rank of α's branch, per head.
        grid: tokens per axis that the tables are made for, without the prefix. The default is the
            model's patch grid, or its largest number of positions; a model of MultiheadAttention
            has no default. Smaller inputs use a part of the tables. Larger ones need `buckets` or
            `resize_offsets`. If a model takes images of one size only, the grid must have at least
            as many patches.
        prefix: the number of tokens before the grid that have no position. The default is the
            number of class, distillation and register tokens in the model, and 0 for text. Any
            other number is an error if the model is one of transformers or timm.
        buckets: as in Translution. The default is None, and 8 for text without a `grid`, which
            keeps tables small and allows inputs of any length. With buckets=n and grid=n + 1,
            offsets up to n have a matrix each and all larger ones share one.
        dry_run: if True, return the plan and leave the model as it is.

    Returns:
        a `Plan` with one `Change` per layer.

    Raises:
        ValueError: an argument does not fit, or a layer cannot be converted exactly; the message
            names the layer and gives the reason. The model is unchanged then. A q or k that is
            followed by a norm cannot become relative with to="translution", because the norm would
            act on each pair; relative "v" and to="alpha" work. A q or k with rotary positions can
            become relative with a `grid` and without buckets. Its table then starts with the
            rotation of each offset, and expects positions 0, 1, 2, ...
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: got {type(model).__name__}, want an nn.Module")
    if to not in ("translution", "alpha"):
        raise ValueError(f"to: got {to!r}, want 'translution' or 'alpha'")
    relative = _check_relative(relative)
    chosen = _layers_to_convert(model, layers)
    embedding = embedding_of(model)
    geometry = geometry_of(model, embedding, grid, prefix, buckets)
    target = Target(to, relative, rank, *geometry, dry_run)
    made: dict[int, Converted] = {}
    changes = []
    for name, module, family in chosen:
        try:
            if id(module) not in made:
                made[id(module)] = _new_layer(model, module, family, target)
                changes.append(_change(name, module, made[id(module)]))
        except ValueError as error:
            raise ValueError(f"{name} ({type(module).__name__}): {error}") from None
    if not dry_run:
        attach(model, {name: made[id(module)] for name, module, _ in chosen})
    return Plan(to, relative, tuple(changes))


def attach(model: nn.Module, layers: Mapping[str, Converted]) -> None:
    """Put converted layers in the place of a model's own.

    Args:
        model: the model.
        layers: each converted layer under every name that it gets in the model.
    """
    for name, new in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new)
    first_names = {id(new): name for name, new in reversed(list(layers.items()))}
    embedding = embedding_of(model)
    patches = None if embedding is None else follow_patches(model, embedding, list(layers))
    for new in {id(new): new for new in layers.values()}.values():
        new.name, new.patches = first_names[id(new)], patches
        new.family.prepare(new)
    for part in model.modules():  # nested tensors would read the replaced layer's weights
        if isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = part.enable_nested_tensor = False


def _check_relative(relative: Any) -> str:
    """`relative` in the order "qkv"; it must name at least one projection."""
    try:
        checked = check_relative(relative)
    except ValueError:
        checked = ""
    if not checked:
        raise ValueError(f"relative: got {relative!r}, want one or more of 'qkv', such as 'kv'")
    return checked


def _layers_to_convert(model: nn.Module, layers: Any) -> list[tuple[str, nn.Module, Family]]:
    """The layers to convert, each under every name that it has in the model.

    Layers that are converted already are counted, so that a layer keeps its number, but they are
    not converted again.
    """
    candidates: list[Candidate] = []
    for name, module in model.named_modules(remove_duplicate=False):
        family = family_of(module)
        cross = name.endswith("multihead_attn")  # in nn.TransformerDecoderLayer
        cross |= bool(getattr(module, "is_cross_attention", False))
        if isinstance(module, Converted) or (family is not None and not cross):
            if not name:
                raise ValueError(
                    "model: got an attention layer itself, want a module that contains it"
                )
            candidates.append((name, module, family))
    if not candidates:
        raise ValueError(
            f"model: got {type(model).__name__}, want one with self-attention of a supported "
            "family (help(convert) lists them)"
        )
    chosen = _selected_layers(model, candidates, layers)
    fresh = [(name, module, family) for name, module, family in chosen if family is not None]
    if not fresh:
        raise ValueError(
            f"layers: got {layers}, but every selected layer ({len(chosen)} of {len(candidates)} "
            "layers) is converted already; make_relative, make_shared and resize_offsets change it"
        )
    return fresh


def _selected_layers(model: nn.Module, candidates: list[Candidate], layers: Any) -> list[Candidate]:
    """The candidates that the argument `layers` of `convert` selects."""
    names = [name for name, _, _ in candidates]
    if layers is None:
        return candidates
    if isinstance(layers, int) and not isinstance(layers, bool):
        if not 1 <= layers <= len(candidates):
            raise ValueError(f"layers: got {layers}, want 1 to {len(candidates)}")
        selected = {id(module) for _, module, _ in candidates[:layers]}
        return [one for one in candidates if id(one[1]) in selected]
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
        raise ValueError(f"layers: got {layers!r}, want an int, or a list of numbers and names")
    named, selected = dict(model.named_modules(remove_duplicate=False)), set()
    for layer in layers:
        is_number = isinstance(layer, int) and -len(candidates) <= layer < len(candidates)
        if layer in names or is_number:
            name, module, family = candidates[layer if is_number else names.index(layer)]
            if family is None:
                raise ValueError(
                    f"layers: got {layer!r}, but {name} is converted already; make_relative, "
                    "make_shared and resize_offsets change it"
                )
            selected.add(id(module))
        else:
            other = type(named.get(layer)).__name__ if layer in named else ""
            hint = f" (a {other}, which is not self-attention of a supported family)"
            raise ValueError(
                f"layers: got {layer!r}{hint if other else ''}, want a number from 0 to "
                f"{len(candidates) - 1}, or one of the names {names}"
            )
    return [one for one in candidates if id(one[1]) in selected]


def _new_layer(model: nn.Module, module: nn.Module, family: Family, target: Target) -> Converted:
    """The replacement of one module, without its `patches`; on the meta device in a dry run."""
    source = family.describe(module)
    if source.causal and target.prefix:
        raise ValueError(f"prefix: got {target.prefix} for a causal layer, want 0")
    # the projections that become tables
    tables = target.relative if target.to == "translution" else ""
    for name in tables:
        if name in source.norms:
            raise ValueError(
                f"relative: {name!r} is followed by a norm, which would act on each pair; want "
                "relative 'v', or to='alpha'"
            )
    rotation = None
    if source.rotary and set(tables) & set("qk"):
        rotation = rotary_frequencies(model, target.buckets)
    weight = source.matrices["q"][0]
    more: dict[str, Any] = {"relative": ""}  # the tables are set below
    if target.to == "alpha":
        more = {"relative": target.relative, "rank": target.rank}
    grid: Any = target.grid if len(target.grid) == 2 else target.grid[0]
    with torch.device("meta") if target.dry_run else weight.device:
        layer: Any = KINDS[target.to, len(target.grid)](
            source.dim, grid, heads=source.heads, head_dim=source.head_dim,
            causal=source.causal, prefix=target.prefix, buckets=target.buckets,
            dropout=source.dropout, **more,
        ).to(weight.dtype)  # fmt: skip
        trained = any(p.requires_grad for p in module.parameters())
        for name, (matrix, bias) in source.matrices.items():
            if name in tables:
                if name != "q":  # a table has columns for every head, also with grouped heads
                    matrix = _repeat_grouped_heads(matrix, source)
                    bias = None if bias is None else _repeat_grouped_heads(bias, source)
                side = _filled_projection(matrix.T, bias, layer.layout.classes, target.dry_run)
            else:
                side = _filled_projection(matrix, bias, None, target.dry_run)
                side = side.requires_grad_(trained)
            setattr(layer, f"{name}_proj", side)
    rotated_by_host = source.rotary and rotation is None
    layer.relative, layer.position = target.relative, "rotary" if rotated_by_host else "none"
    layer.scale = source.scale
    layer.train(module.training).o_proj = source.out  # the model's own part keeps its mode
    if target.to == "alpha":
        _start_as_attention(layer)
    if rotation is not None and not target.dry_run:
        put_rotation_into_table(layer, *rotation)
    made = Converted(layer, source, family, family.arguments(module))
    made.training = module.training
    return made


@torch.no_grad()
def _filled_projection(
    matrix: Tensor, bias: Tensor | None, classes: int | None, dry_run: bool
) -> Any:
    """A projection that starts with the given matrix.

    Args:
        matrix: [out, in] for an nn.Linear; [in, out] for a table, whose every offset class starts
            with it.
        bias: [out], or None.
        classes: the number of offset classes of a table, or None for an nn.Linear.
        dry_run: if True, leave the weights as they are (they have no memory).
    """
    inner, outer = matrix.shape if classes is not None else matrix.shape[::-1]
    made = projection(inner, outer, classes, bias is not None).to(matrix.dtype)
    if not dry_run:
        made.weight.copy_(matrix)
        if made.bias is not None and bias is not None:
            made.bias.copy_(bias)
    return made


def _repeat_grouped_heads(t: Tensor, source: Source) -> Tensor:
    """The rows of each key or value head, repeated for every query head that uses it."""
    heads = t.unflatten(0, (source.kv_heads or source.heads, -1))
    return heads.repeat_interleave(source.heads // len(heads), 0).flatten(0, 1)


@torch.no_grad()
def _start_as_attention(layer: Any) -> None:
    """Set the weights of α-Translution so that it computes the attention that it contains.

    Its low-rank branch becomes zero. α averages the two branches, so the attention branch is
    doubled: through the scale (a norm would undo a doubled W_q) and through W_v.
    """
    if layer.relative_scores:
        (layer.q_table if "q" in layer.relative else layer.k_table).weight.zero_()
        layer.scale *= 2
    if "v" in layer.relative:
        layer.v_table.weight.zero_()
        for p in layer.v_proj.parameters():
            p.mul_(2)


def _change(name: str, module: nn.Module, made: Converted) -> Change:
    def size(m: nn.Module) -> tuple[int, int]:
        parameters = list(m.parameters())
        in_bytes = sum(p.numel() * p.element_size() for p in parameters)
        return sum(p.numel() for p in parameters), in_bytes

    before, after = size(module), size(made)
    return Change(
        name, type(module).__name__, made.layer.layout,
        (before[0], after[0]), (before[1], after[1]),
    )  # fmt: skip
