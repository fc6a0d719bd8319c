"""Attention within windows of the image, which shift from layer to layer (Swin), and its ACmix."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._renamed import renamed_arguments
from .checks import check_image, check_int
from .convolution_path import ACmixBase, ConvolutionPath, ImageAttention, pad_to_multiple

__all__ = ["WindowACmix2d", "WindowAttention2d"]


@renamed_arguments(channels="dim", window="window_size")
class WindowAttention2d(ImageAttention):
    """Attention within windows of w×w positions, with a learned number per offset and head.

    s_ij = q_i · k_j / sqrt(head_dim) + bias[offset of i and j] (Swin transformer, sections 3.1 and
    3.2). With a shift s, the borders of the windows are at s, s + w, ..., so that successive layers
    connect positions that one layer's windows separate. The map is rolled by the shift so that the
    windows are whole, and positions that only became neighbours by rolling do not see each other.
    An axis that is not longer than the window is one window without a shift. The map may have any
    size: it is padded to whole windows, and no position sees the padding.

    Args:
        dim: channels of the image, in and out.
        heads: the number of heads, a divisor of dim.
        window_size: positions along a side of a window.
        shift: of the windows, less than `window_size`; Swin shifts by half a window in every second
            layer.
        bias: whether the query, key and value projections have a bias.
        qk_scale: what q · k is multiplied by; None is 1 / sqrt(head_dim).
        device, dtype: of the parameters, as in torch's own modules.

    Attributes:
        q_proj, k_proj, v_proj, o_proj: nn.Conv2d, 1×1.
        position_bias: nn.Parameter [(2w - 1)², heads] for window_size w; the row is
            (Δrow + w - 1) · (2w - 1) + Δcolumn + w - 1, with Δ = query - key.

    Shapes:
        image [batch, channels, height, width] -> the same.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """

    q_proj: nn.Conv2d
    k_proj: nn.Conv2d
    v_proj: nn.Conv2d

    def __init__(
        self,
        dim: int,
        heads: int,
        window_size: int = 7,
        shift: int = 0,
        bias: bool = True,
        qk_scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value, least in (
            ("dim", dim, 1), ("heads", heads, 1), ("window_size", window_size, 1),
            ("shift", shift, 0),
        ):  # fmt: skip
            check_int(name, value, least)
        if dim % heads:
            raise ValueError(f"heads: got {heads}, want a divisor of dim {dim}")
        if shift >= window_size:
            raise ValueError(f"shift: got {shift}, want less than window_size {window_size}")
        if qk_scale is not None and not 0 < qk_scale < math.inf:
            raise ValueError(f"qk_scale: got {qk_scale}, want a finite number of more than 0")
        self.dim, self.heads, self.head_dim = dim, heads, dim // heads
        self.qk_scale = qk_scale
        self.window_size, self.shift = window_size, shift
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        # The bias of the keys is the same for all keys and cancels in the softmax, so without a
        # convolution path its gradient is zero.
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Conv2d(dim, dim, 1, bias=bias, **factory))
        self.o_proj = nn.Conv2d(dim, dim, 1, **factory)
        # On a map smaller than the window, the rows of its far offsets get no gradient.
        self.position_bias = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, heads, **factory))
        nn.init.trunc_normal_(self.position_bias, std=0.02)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        check_image(x, self.dim, self.q_proj)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        height, width = query.shape[2:]
        rows, columns = self._axis(height), self._axis(width)
        q, k, v = (_windows(m, rows, columns, self.heads) for m in (query, key, value))
        bias = self._bias(rows[0], columns[0])
        if max(rows[1:]) == max(columns[1:]) == 0:
            y = F.scaled_dot_product_attention(
                q.flatten(0, 1),
                k.flatten(0, 1),
                v.flatten(0, 1),
                bias.to(q.dtype)[None],
                scale=self.qk_scale,
            ).unflatten(0, q.shape[:2])
        else:
            # Each window has a mask of its own, so windows and heads form one axis of the call.
            seen = _seen((height, width), rows, columns, query.device)[:, None]
            mask = bias.masked_fill(~seen, float("-inf")).flatten(0, 1)
            y = F.scaled_dot_product_attention(
                q.flatten(1, 2),
                k.flatten(1, 2),
                v.flatten(1, 2),
                mask.to(q.dtype)[None],
                scale=self.qk_scale,
            ).unflatten(1, q.shape[1:3])
        return self.o_proj(_joined(y, (height, width), rows, columns))

    def _axis(self, size: int) -> tuple[int, int, int]:
        """(window size, shift, padding that completes the last window) of an axis."""
        if size <= self.window_size:
            return size, 0, 0
        return self.window_size, self.shift, -size % self.window_size

    def _bias(self, height: int, width: int) -> Tensor:
        """The bias of a window of this size, [heads, positions, positions]."""
        side = 2 * self.window_size - 1
        device = self.position_bias.device
        rows, columns = (torch.arange(n, device=device) for n in (height, width))
        row, column = (i[:, None] - i + self.window_size - 1 for i in (rows, columns))
        index = row[:, None, :, None] * side + column[None, :, None, :]
        return self.position_bias[index.flatten(2).flatten(0, 1)].permute(2, 0, 1)

    def extra_repr(self) -> str:
        return f"{self.dim}, heads={self.heads}, window_size={self.window_size}, shift={self.shift}"


Axis = tuple[int, int, int]


def _windows(x: Tensor, rows: Axis, columns: Axis, heads: int) -> Tensor:
    """[batch, channels, height, width] -> [batch, windows, heads, positions, head_dim]."""
    x = pad_to_multiple(x, rows[0], columns[0])
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
    """Whether a position sees another one of its window, [windows, positions, positions].

    Three kinds of positions can be in one window, on each axis: those that were not moved, those
    that rolling moved to the other end, and the padding. Each sees its own kind. The padding thus
    sees itself, which nobody else does, because a softmax over nothing would be NaN.
    """
    kinds = []
    for n, (window, shift, more) in zip(size, (rows, columns), strict=True):
        position = torch.arange(n + more, device=device)
        kind = (position >= n + more - shift).long()
        # After rolling, position p holds what was at p + shift.
        kind = torch.where(position.roll(-shift) >= n, 2, kind)
        kinds.append(kind.unflatten(0, (-1, window)))
    kind = 3 * kinds[0][:, None, :, None] + kinds[1][None, :, None, :]
    kind = kind.flatten(2).flatten(0, 1)
    return kind[:, :, None] == kind[:, None, :]


@renamed_arguments(conv_kernel="conv_kernel_size")
class WindowACmix2d(ACmixBase, WindowAttention2d):
    """Window attention and a convolution, from the same q, k and v: Swin's ACmix.

    y = α · o_proj(attention) + β · convolution (ACmix, section 4). Only the attention's path has an
    output projection. The convolution uses the 3 · heads slices of q, k and v, and runs over the
    whole map, across the borders of windows.

    Args:
        dim, heads, window_size, shift: as in `WindowAttention2d`.
        conv_kernel_size: size of the convolution's kernel, odd.
        bias: whether the query, key and value projections and the convolution have a bias.
        learned_shifts: whether the shift kernels of the convolution are parameters. If not, fc has
            no bias.
        published: follow the published code where it differs from the paper, to use weights that
            were trained with it: the convolution runs on the rolled map, where opposite borders
            touch, has no bias, and its channels, ordered (channel, head), are added to the output
            of the attention without reordering.
        qk_scale: as in `WindowAttention2d`.
        device, dtype: of the parameters, as in torch's own modules.

    Attributes:
        q_proj, k_proj, v_proj, o_proj: nn.Conv2d, 1×1.
        position_bias: nn.Parameter [(2 · window_size - 1)², heads].
        convolution: `ConvolutionPath`.
        alpha, beta: scalars that start at one half.

    Shapes:
        image [batch, channels, height, width] -> the same.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window_size: int = 7,
        shift: int = 0,
        conv_kernel_size: int = 3,
        bias: bool = True,
        learned_shifts: bool = True,
        published: bool = False,
        qk_scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        WindowAttention2d.__init__(
            self, dim, heads, window_size, shift, bias, qk_scale, device, dtype
        )
        self.published = published
        # Through shifts that are not learned, fc's bias adds one number to all channels, which the
        # layer norm that follows removes.
        self.add_convolution(
            ConvolutionPath(
                3 * heads,
                self.head_dim,
                dim,
                conv_kernel_size,
                bias=bias and not published,
                fc_bias=learned_shifts,
                learned=learned_shifts,
                grouped_order=published,
                device=device,
                dtype=dtype,
            )
        )

    def convolve(
        self, query: Tensor, key: Tensor, value: Tensor, multiplier: Tensor | None = None
    ) -> Tensor:
        if not self.published:
            return self.convolution(query, key, value, multiplier=multiplier)
        shifts = [self._axis(n)[1] for n in query.shape[2:]]
        maps = [m.roll([-s for s in shifts], (2, 3)) for m in (query, key, value)]
        return self.convolution(*maps, multiplier=multiplier).roll(shifts, (2, 3))
