"""Positions for attention whose projections are shared: rotary, and a learned relative bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional  # noqa: F401  (registers the operators)
from ..layouts import Layout

__all__ = ["RelativeBias", "check_rotary", "rotate"]


def check_rotary(head_dim: int, axes: int) -> None:
    """Rotary positions pair channels, and divide the pairs over the axes."""
    if head_dim % (2 * axes):
        raise ValueError(
            f"head_dim: got {head_dim}, rotary on {axes} axes wants a multiple of {2 * axes}"
        )


def rotate(
    x: Tensor, layout: Layout, tokens: tuple[int, ...] | None = None, start: int = 0
) -> Tensor:
    """Rotary positions: turn the channel pairs of each head by angles linear in the position.

    With A axes and head_dim d, channel p pairs with p + d/2; the first d/(2A) pairs turn with the
    first axis, the next with the second; angle = position * 10000^(-p / (d / (2A))). Prefix tokens
    have no place and are not turned.

    Args:
        x: [batch, heads, tokens, head_dim].
        layout: where the tokens are.
        tokens: which tokens of the layout `x` holds; None is all.
        start: the position of the grid's first token.
    """
    axes = len(layout.grid)
    each = x.shape[-1] // (2 * axes)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rate = 10000.0 ** (-torch.arange(each, device=x.device, dtype=wide) / each)
    places = torch.ops.translution.layout_positions(x, layout.key)
    angle = ((places + start).to(wide)[..., None] * rate).flatten(1)
    angle = torch.cat([angle.new_zeros(layout.prefix, angle.shape[1]), angle])
    if tokens is not None:
        angle = angle[list(tokens)]
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(wide).chunk(2, -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.to(x.dtype)


class RelativeBias(nn.Module):
    """A learned number per class of pairs and head, added to the scores.

    Attributes:
        weight: [classes, heads], starts at zero.
    """

    def __init__(self, classes: int, heads: int):
        super().__init__()
        self.classes, self.heads = classes, heads
        self.weight = nn.Parameter(torch.zeros(classes, heads))

    def forward(self, index: Tensor) -> Tensor:
        """[heads, queries, keys] of an index [queries, keys]; -inf where the pair is absent."""
        bias = self.weight[index.clamp(min=0)].permute(2, 0, 1)
        return bias.masked_fill(index < 0, float("-inf"))

    def extra_repr(self) -> str:
        return f"classes={self.classes}, heads={self.heads}"
