"""Attention within windows of the image, which shift from layer to layer (Swin), and its ACmix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .acmix import ConvolutionPath, ImageAttention, Mixed, filled
from .checks import check_image, check_int

__all__ = ["WindowACmix2d", "WindowAttention2d"]


class WindowAttention2d(ImageAttention):
    """Attention within windows of w×w places, with a learned number per offset and head.

    s_ij = q_i · k_j / sqrt(head_dim) + bias[offset of i and j] (Swin transformer, sections 3.1 and
    3.2). With a shift s, the borders of the windows lie at s, s + w, ..., so that successive layers
    join what the windows of one keep apart. The map is rolled by the shift to fill whole windows,
    and places that only the rolling brought together don't see each other. An axis that is not
    longer than the window is one window, without a shift. Any size will do: the places that fill
    up the last window are seen by no one.

    Args:
        channels: of the image, in and out.
        heads: a divisor of channels.
        window: size of the windows.
        shift: of the windows, less than `window`; Swin takes half of it in every second layer.
        bias: on the query, key and value projections.

    Attributes:
        q_proj, k_proj, v_proj, o_proj: nn.Conv2d, 1×1.
        position_bias: nn.Parameter [(2 · window - 1)², heads], row
            (Δrow + window - 1) · (2 · window - 1) + Δcolumn + window - 1, Δ = query - key.

    Shapes:
        image [batch, channels, height, width] -> the same.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """

    q_proj: nn.Conv2d
    k_proj: nn.Conv2d
    v_proj: nn.Conv2d

    def __init__(
        self, channels: int, heads: int, window: int = 7, shift: int = 0, bias: bool = True
    ):
        super().__init__()
        for name, value, least in (
            ("channels", channels, 1), ("heads", heads, 1), ("window", window, 1),
            ("shift", shift, 0),
        ):  # fmt: skip
            check_int(name, value, least)
        if channels % heads:
            raise ValueError(f"heads: got {heads}, want a divisor of channels {channels}")
        if shift >= window:
            raise ValueError(f"shift: got {shift}, want less than window {window}")
        self.channels, self.heads, self.head_dim = channels, heads, channels // heads
        self.window, self.shift = window, shift
        # the keys' bias is the same for all keys and cancels in the softmax: without a convolution
        # path its gradient is zero
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Conv2d(channels, channels, 1, bias=bias))
        self.o_proj = nn.Conv2d(channels, channels, 1)
        # a map smaller than the window leaves the rows of its far offsets without a gradient
        self.position_bias = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.position_bias, std=0.02)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        check_image(x, self.channels, self.q_proj.weight)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        height, width = query.shape[2:]
        rows, columns = self._axis(height), self._axis(width)
        q, k, v = (_windows(m, rows, columns, self.heads) for m in (query, key, value))
        bias = self._bias(rows[0], columns[0])
        if max(rows[1:]) == max(columns[1:]) == 0:
            y = F.scaled_dot_product_attention(
                q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias.to(q.dtype)[None]
            ).unflatten(0, q.shape[:2])
        else:
            # each window has its own mask: the windows stand beside the heads, over the batch
            seen = _seen((height, width), rows, columns, query.device)[:, None]
            mask = bias.masked_fill(~seen, float("-inf")).flatten(0, 1)
            y = F.scaled_dot_product_attention(
                q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), mask.to(q.dtype)[None]
            ).unflatten(1, q.shape[1:3])
        return self.o_proj(_joined(y, (height, width), rows, columns))

    def _axis(self, size: int) -> tuple[int, int, int]:
        """(window, shift, places added to fill the last window) of an axis."""
        if size <= self.window:
            return size, 0, 0
        return self.window, self.shift, -size % self.window

    def _bias(self, height: int, width: int) -> Tensor:
        """[heads, places, places] of a window of this size."""
        side = 2 * self.window - 1
        device = self.position_bias.device
        rows, columns = (torch.arange(n, device=device) for n in (height, width))
        row, column = (i[:, None] - i + self.window - 1 for i in (rows, columns))
        index = row[:, None, :, None] * side + column[None, :, None, :]
        return self.position_bias[index.flatten(2).flatten(0, 1)].permute(2, 0, 1)

    def extra_repr(self) -> str:
        return f"{self.channels}, heads={self.heads}, window={self.window}, shift={self.shift}"


Axis = tuple[int, int, int]


def _windows(x: Tensor, rows: Axis, columns: Axis, heads: int) -> Tensor:
    """[batch, channels, height, width] -> [batch, windows, heads, places, head_dim]."""
    x = filled(x, rows[0], columns[0])
    if rows[1] or columns[1]:
        x = x.roll((-rows[1], -columns[1]), (2, 3))
    x = x.unflatten(3, (-1, columns[0])).unflatten(2, (-1, rows[0]))
    x = x.unflatten(1, (heads, -1)).permute(0, 3, 5, 1, 4, 6, 2)
    return x.flatten(1, 2).flatten(3, 4)


def _joined(x: Tensor, size: tuple[int, int], rows: Axis, columns: Axis) -> Tensor:
    """The inverse of `_windows`."""
    x = x.unflatten(3, (rows[0], columns[0])).unflatten(1, ((size[0] + rows[2]) // rows[0], -1))
    x = x.permute(0, 3, 6, 1, 4, 2, 5).flatten(5).flatten(3, 4).flatten(1, 2)
    if rows[1] or columns[1]:
        x = x.roll((rows[1], columns[1]), (2, 3))
    return x[:, :, : size[0], : size[1]]


def _seen(size: tuple[int, int], rows: Axis, columns: Axis, device: torch.device) -> Tensor:
    """[windows, places, places]: whether a place may see another of its window.

    Three kinds of place can meet in a window on each axis: those where they were, those that the
    roll brought round, and the padding. They see their own kind, so that the padding, seen by
    nothing else, has something to see as well (a softmax over nothing is NaN).
    """
    kinds = []
    for n, (window, shift, more) in zip(size, (rows, columns), strict=True):
        place = torch.arange(n + more, device=device)
        kind = (place >= n + more - shift).long()
        # rolled, place p holds what stood at p + shift
        kind = torch.where(place.roll(-shift) >= n, 2, kind)
        kinds.append(kind.unflatten(0, (-1, window)))
    kind = 3 * kinds[0][:, None, :, None] + kinds[1][None, :, None, :]
    kind = kind.flatten(2).flatten(0, 1)
    return kind[:, :, None] == kind[:, None, :]


class WindowACmix2d(Mixed, WindowAttention2d):
    """Window attention and a convolution, from the same q, k and v: Swin's ACmix.

    y = α · o_proj(attention) + β · convolution (ACmix, section 4). The output projection is on the
    attention's path only. The convolution takes the 3 · heads slices of q, k and v, and runs over
    the whole map, across the borders of windows.

    Args:
        channels, heads, window, shift: as in WindowAttention2d.
        conv_kernel: size of the convolution's kernel, odd.
        bias: on the query, key and value projections and on the convolution.
        learned_shifts: whether the convolution's shifts may become other kernels; if not, fc has
            no bias.
        published: agree with the published code where it differs from the paper, to use weights
            trained with it: the convolution runs on the map rolled by the shift, where opposite
            borders touch, has no bias, and its outputs, ordered (channel, head), are added to the
            attention's, ordered by the output projection, as they are.

    Attributes:
        q_proj, k_proj, v_proj, o_proj: nn.Conv2d, 1×1.
        position_bias: nn.Parameter [(2 · window - 1)², heads].
        convolution: `ConvolutionPath`.
        alpha, beta: scalars that start at one half.

    Shapes:
        image [batch, channels, height, width] -> the same.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        window: int = 7,
        shift: int = 0,
        conv_kernel: int = 3,
        bias: bool = True,
        learned_shifts: bool = True,
        published: bool = False,
    ):
        WindowAttention2d.__init__(self, channels, heads, window, shift, bias)
        self.published = published
        # fc's bias through shifts that are not learned is one number for all channels, which the
        # layer norm after it takes away
        self.mix(
            ConvolutionPath(
                3 * heads,
                self.head_dim,
                channels,
                conv_kernel,
                bias=bias and not published,
                fc_bias=learned_shifts,
                learned=learned_shifts,
                grouped_order=published,
            )
        )

    def convolve(
        self, query: Tensor, key: Tensor, value: Tensor, times: Tensor | None = None
    ) -> Tensor:
        if not self.published:
            return self.convolution(query, key, value, times=times)
        shifts = [self._axis(n)[1] for n in query.shape[2:]]
        maps = [m.roll([-s for s in shifts], (2, 3)) for m in (query, key, value)]
        return self.convolution(*maps, times=times).roll(shifts, (2, 3))
