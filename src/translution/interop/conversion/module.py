"""The module that takes the place of another library's attention."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layouts import Layout
from ...operands import Operand, as_operand
from .sources import Family, Source

__all__ = ["Converted", "Patches", "rotated"]


class Patches:
    """Where the patches of an image model stand: its patch embedding tells, image by image.

    Attributes:
        grid: rows and columns of the last images; None before the first.
    """

    def __init__(self) -> None:
        self.grid: tuple[int, ...] | None = None

    def see(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """A forward hook of the convolution that makes patches."""
        self.grid = tuple(output.shape[-2:])


class Converted(nn.Module):
    """Translution behind another library's forward signature.

    Its host calls it as it called what was there: with masks, rotary positions and caches of its
    own. A cache then holds, per layer, what this one's keys and values are made from (the inputs,
    where they are relative).

    Args:
        layer: Translution or α-Translution, whose projections and layout are used. Where it says
            `rotary`, q and k are turned by the host's positions.
        source: what the replaced module held beside them.
        family: how it was called.
        arguments: the names of its forward's arguments.

    Attributes:
        patches: on images, what knows the grid of the input.
        name: its own in the model that was converted.

    Raises:
        ValueError: (forward) an input or cache that the layer has no places for.
    """

    def __init__(
        self,
        layer: Any,
        source: Source,
        family: Family,
        arguments: tuple[str, ...],
    ):
        super().__init__()
        self.layer, self.family, self.arguments = layer, family, arguments
        self.index = source.index
        self.patches: Patches | None = None
        self.name = ""
        self.grouped = source.heads // (source.kv_heads or source.heads)
        self.norms = nn.ModuleDict(source.norms)
        self.between = nn.ModuleDict(source.between)
        self.after = source.after
        for name, value in source.tell.items():
            setattr(self, name, value)

    def forward(self, *args: Any, **given: Any) -> Any:
        """As that of the replaced module."""
        given = dict(zip(self.arguments, args, strict=False)) | given
        call = self.family.read(self, given)
        sides = self._sides(call.x, call.turn if self.layer.position == "rotary" else None)
        held = 0
        if call.cache is not None:
            sides, held = self._recall(sides, call.cache)
        sides = {name: self._each_head(name, side) for name, side in sides.items()}
        layout = self._layout(call.x.shape[1], held)
        s, mask = self._scores(sides, layout), call.mask
        empty = layout.may_be_empty
        if mask is not None and mask.dtype != torch.bool:
            s, mask, empty = s + mask, None, True
        a = self.layer.primitives.softmax(s, mask, empty)
        y = self._mix(F.dropout(a, self.layer.dropout, self.training), sides, layout)
        if "norm" in self.between:
            y = self.between["norm"](y)
        if "gate" in self.between:
            y = y * self.between["gate"](call.x).sigmoid()
        y = self.after(self.layer.o_proj(y))
        return self.family.answer(self, given, y, self.layer.primitives.weights(a).to(y.dtype))

    def _sides(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> dict[str, Operand]:
        """What scores and mix are made from; α's branch under "low q" and so on."""
        layer, sides = self.layer, {}
        for name in "qkv":
            side = as_operand(getattr(layer, f"{name}_proj")(x))
            turned = turn is not None and name in "qk"
            if name in self.norms or turned:
                if side.weight is not None:
                    raise ValueError(
                        f"relative: {name!r} has a norm or rotary positions, want it shared"
                    )
                heads = side.x.unflatten(-1, (-1, layer.head_dim))
                heads = self.norms[name](heads) if name in self.norms else heads
                if turn is not None and turned:
                    heads = rotated(heads, *(t.unsqueeze(-2) for t in turn))
                side = Operand(heads.flatten(-2))
            sides[name] = side
            if hasattr(layer, f"{name}_down"):
                sides[f"low {name}"] = layer._branch(name, x)
        return sides

    def _recall(self, sides: dict[str, Operand], cache: Any) -> tuple[dict[str, Operand], int]:
        """The sides with the tokens before, and how many those are. What is kept is one tensor
        beside the other, each once; the cache knows it as keys of a single head."""
        if not self.layer.layout.causal:
            raise ValueError("past_key_values: got a cache, want none: the layer is not causal")
        kept = {id(s.x): s.x for name, s in sides.items() if name[-1] in "kv"}
        packed = torch.cat(list(kept.values()), -1)[:, None]
        rows, _ = cache.update(packed, packed[..., :0], self.index)
        each = rows[:, 0].split([x.shape[-1] for x in kept.values()], -1)
        found = dict(zip(kept, each, strict=True))
        whole = {n: s._replace(x=found[id(s.x)]) if n[-1] in "kv" else s for n, s in sides.items()}
        return whole, rows.shape[2] - packed.shape[2]

    def _each_head(self, name: str, side: Operand) -> Operand:
        """A shared key or value of grouped heads, for each of them."""
        if self.grouped == 1 or name not in ("k", "v") or side.weight is not None:
            return side
        heads = side.x.unflatten(-1, (-1, self.layer.head_dim))
        return Operand(heads.repeat_interleave(self.grouped, -2).flatten(-2))

    def _scores(self, sides: dict[str, Operand], layout: Layout) -> Tensor:
        """The mean over the branches, as in α-Translution; Translution has one."""
        branches = [name for name in ("", "low ") if f"{name}q" in sides]
        scores = []
        for name in branches:
            q, k = sides[f"{name}q"], sides[f"{name}k"]
            scores.append(
                self.layer.primitives.scores(
                    q, k, layout, heads=self.layer.heads, scale=self.layer.scale / len(branches)
                )
            )
        return sum(scores[1:], scores[0])

    def _mix(self, a: Tensor, sides: dict[str, Operand], layout: Layout) -> Tensor:
        mix = self.layer.primitives.mix
        y = mix(a, sides["v"], layout)
        if "low v" not in sides:
            return y
        return (y + self.layer.v_up(mix(a, sides["low v"], layout))) / 2

    def _layout(self, new: int, held: int) -> Layout:
        layout = self.layer.layout
        if len(layout.grid) == 1:
            grid: tuple[int, ...] = (max(held + new - layout.prefix, 1),)
        else:
            grid = (self.patches.grid if self.patches else None) or layout.grid
        if layout.prefix + math.prod(grid) != held + new:
            raise ValueError(
                f"tokens: got {held + new}, want {layout.prefix + math.prod(grid)} for the grid "
                f"{grid} after {layout.prefix} prefix tokens"
            )
        return _layout_of(layout.spec, grid, held)


def _layout_of(spec: str, grid: tuple[int, ...], held: int) -> Layout:
    """Tracing takes the layout as a constant, as in `Attention`."""
    return _cached_layout_of(spec, grid, held)


_layout_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=256)
def _cached_layout_of(spec: str, grid: tuple[int, ...], held: int) -> Layout:
    layout = Layout.parse(spec)
    layout = layout if grid == layout.grid else layout.at(grid)
    return layout.select(queries=range(held, layout.tokens)) if held else layout


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (p, p + d/2) of the last axis, as Llama does."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
