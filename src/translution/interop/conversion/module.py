"""The module that takes the place of another library's attention."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layouts import Layout
from ...modules.projections import repeat_heads
from ...operands import Operand, as_operand
from .grids import Patches, only_grid
from .rotary import rotated
from .sources import Family, Source

__all__ = ["Converted"]


class Converted(nn.Module):
    """Translution or α-Translution with the forward signature of another library's attention.

    The model calls it as it called the replaced module, with its own masks, rotary positions and
    caches. Per layer, a cache holds the keys and values, or the layer's inputs where a key or value
    is relative.

    Args:
        layer: the Translution or α-Translution layer whose projections and layout are used. With
            `layer.position` "rotary", q and k are rotated by the model's positions.
        source: the other parts of the replaced module.
        family: the adapter for the replaced module's forward.
        arguments: the argument names of that forward, in order.

    Attributes:
        patches: finds the patch grid of the input, for image models; None for other models.
        name: the name of the layer in the converted model.

    Raises:
        ValueError: (from forward) an input that does not fit the layout, or a cache for a layer
            that is not causal.
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
        self.norms = nn.ModuleDict(source.norms)
        self.between = nn.ModuleDict(source.between)
        self.after = source.after
        for name, value in source.attributes.items():
            setattr(self, name, value)

    def forward(self, *args: Any, **given: Any) -> Any:
        """Take the arguments of the replaced module's forward, and return what it returned."""
        given = dict(zip(self.arguments, args, strict=False)) | given
        call = self.family.read(self, given)
        sides = self._sides(call.x, call.rotation if self.layer.position == "rotary" else None)
        held = 0
        if call.cache is not None:
            sides, held = self._update_cache(sides, call.cache)
        for name in "kv":
            sides[name] = repeat_heads(sides[name], self.layer.heads, self.layer.head_dim)
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
        return self.family.result(self, given, y, self.layer.primitives.weights(a).to(y.dtype))

    def _sides(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> dict[str, Operand]:
        """The operands q, k and v of the tokens x, and α's low-rank branch as "low q" and so on."""
        layer, sides = self.layer, {}
        for name in "qkv":
            side = as_operand(getattr(layer, f"{name}_proj")(x))
            rotates = rotation is not None and name in "qk"
            if name in self.norms or rotates:
                if side.weight is not None:
                    raise ValueError(
                        f"relative: {name!r} has a norm or rotary positions, want it shared"
                    )
                heads = side.x.unflatten(-1, (-1, layer.head_dim))
                heads = self.norms[name](heads) if name in self.norms else heads
                if rotation is not None and rotates:
                    heads = rotated(heads, *(t.unsqueeze(-2) for t in rotation))
                side = Operand(heads.flatten(-2))
            sides[name] = side
            if hasattr(layer, f"{name}_down"):
                sides[f"low {name}"] = layer._branch(name, x)
        return sides

    def _update_cache(
        self, sides: dict[str, Operand], cache: Any
    ) -> tuple[dict[str, Operand], int]:
        """Append the new tokens to the cache.

        The tensors of k and v are stored side by side on the last axis, each once, in the cache's
        keys, which therefore have a single head.

        Returns:
            the sides, of which k and v contain the earlier tokens too, and the number of those.
        """
        if not self.layer.layout.causal:
            raise ValueError("past_key_values: got a cache, want none: the layer is not causal")
        kept = {id(s.x): s.x for name, s in sides.items() if name[-1] in "kv"}
        packed = torch.cat(list(kept.values()), -1)[:, None]
        rows, _ = cache.update(packed, packed[..., :0], self.index)
        each = rows[:, 0].split([x.shape[-1] for x in kept.values()], -1)
        cached = dict(zip(kept, each, strict=True))
        whole = {n: s._replace(x=cached[id(s.x)]) if n[-1] in "kv" else s for n, s in sides.items()}
        return whole, rows.shape[2] - packed.shape[2]

    def _scores(self, sides: dict[str, Operand], layout: Layout) -> Tensor:
        """The mean of the branches' scores: two branches in α-Translution, one in Translution."""
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
        elif self.patches is None:
            grid = layout.grid
        else:
            grid = self.patches.grid or only_grid(layout.spec, operator.index(held + new))
        grid = tuple(operator.index(n) for n in grid)  # a layout needs numbers while tracing
        if layout.prefix + math.prod(grid) != held + new:
            raise ValueError(
                f"tokens: got {held + new}, want {layout.prefix + math.prod(grid)} for the grid "
                f"{grid} after {layout.prefix} prefix tokens"
            )
        return _layout_of(layout.spec, grid, held)


def _layout_of(spec: str, grid: tuple[int, ...], held: int) -> Layout:
    """The layout of the new queries; a function of its own, which tracing takes as a constant."""
    return _cached_layout_of(spec, grid, held)


_layout_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=256)
def _cached_layout_of(spec: str, grid: tuple[int, ...], held: int) -> Layout:
    layout = Layout.parse(spec)
    layout = layout if grid == layout.grid else layout.at(grid)
    return layout.select(queries=range(held, layout.tokens)) if held else layout
