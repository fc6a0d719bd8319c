"""Positions for attention whose projections are shared: rotary, and a learned relative bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional.offset_operators import layout_positions
from ..layouts import Layout

__all__ = ["RelativeBias", "apply_rotary", "check_rotary", "rotary_angles"]


def check_rotary(head_dim: int, axes: int) -> None:
    """Check that the channels of a head form pairs that can be divided among the axes.

    Raises:
        ValueError: they do not.
    """
    if head_dim % (2 * axes):
        raise ValueError(
            f"head_dim: got {head_dim}, rotary on {axes} axes wants a multiple of {2 * axes}"
        )


def rotary_angles(x: Tensor, layout: Layout, start: int = 0) -> tuple[Tensor, Tensor]:
    """The cosines and sines of rotary positions, by which `apply_rotary` rotates channel pairs.

    With A axes and head_dim d, channel p forms a pair with channel p + d/2. The first d/(2A) pairs
    rotate with the position on the first axis, the next with that on the second, and so on, by the
    angle position · 10000^(-p / (d / (2A))). Prefix tokens have no position and are not rotated.

    Args:
        x: [batch, heads, tokens, head_dim]. The tokens are the last ones of the layout: all of
            them, or those that follow a cache.
        layout: the `Layout` of the tokens.
        start: the position of the grid's first token.

    Returns:
        (cosines, sines), [tokens, head_dim / 2] each, in float64 for float64 and else in float32.
    """
    each = x.shape[-1] // (2 * len(layout.grid))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rate = 10000.0 ** (-torch.arange(each, device=x.device, dtype=wide) / each)
    positions = layout_positions(x, layout)[layout.tokens - x.shape[-2] :]
    angle = ((positions + start).to(wide)[..., None] * rate).flatten(1)
    angle = torch.cat([angle.new_zeros(layout.prefix, angle.shape[1]), angle])
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs of x, [batch, heads, tokens, head_dim].

    Its tokens are the first ones of those that `rotary_angles` computed angles for.
    """
    cos, sin = cos[: x.shape[-2]], sin[: x.shape[-2]]
    first, second = x.to(cos.dtype).chunk(2, -1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.to(x.dtype)


class RelativeBias(nn.Module):
    """A learned number per offset class and head, which is added to the scores.

    Attributes:
        weight: [classes, heads], zero at the start.
    """

    def __init__(
        self,
        classes: int,
        heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.classes, self.heads = classes, heads
        self.weight = nn.Parameter(torch.zeros(classes, heads, device=device, dtype=dtype))

    def forward(self, index: Tensor) -> Tensor:
        """The bias [heads, queries, keys] for a `Layout.index`; -inf where a pair is absent."""
        bias = self.weight[index.clamp(min=0)].permute(2, 0, 1)
        return bias.masked_fill(index < 0, float("-inf"))

    def extra_repr(self) -> str:
        return f"classes={self.classes}, heads={self.heads}"
