"""A convolution decomposed into k² 1×1 convolutions, whose results are shifted and summed.

A k×k convolution multiplies the input at each neighbour of a position by the matrix of that tap,
and sums the k² products. The multiplications can be done first: one 1×1 convolution multiplies
every position by the matrices of all taps, which gives k² maps. The neighbourhood then consists of
shifting these maps and summing them, without any further multiplication. (ACmix, section 3.1,
eqs. 2-5.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layouts import Sizes
from ..neighborhoods import pair

__all__ = ["convolution_by_shifts", "shift_and_sum", "shift_kernels"]


def shift_and_sum(
    maps: Tensor,
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Sizes | None = None,
    dilation: Sizes = 1,
) -> Tensor:
    """Shift the map of each tap by the offset of the tap, and sum the shifted maps.

    `y[p] = Σ_t maps[t][stride · p + dilation · t - padding]`, where t runs over the taps (row,
    column) of the kernel in row-major order. Outside of the maps there are zeros.

    Args:
        maps: [batch, taps, channels, height, width], with taps = rows · columns of the kernel.
        kernel_size, stride, dilation: an int or (rows, columns).
        padding: the number of zeros around the maps. None is dilation · (kernel_size - 1) / 2. It
            keeps the size at stride 1 and needs an odd kernel.

    Returns:
        [batch, channels, out height, out width]; sizes are those of nn.Conv2d.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """
    kernel, step, spread = (
        pair(name, value)
        for name, value in (
            ("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation),
        )
    )  # fmt: skip
    if maps.ndim != 5 or maps.shape[1] != kernel[0] * kernel[1]:
        raise ValueError(
            f"maps: got shape {tuple(maps.shape)}, want (batch, taps {kernel[0] * kernel[1]}, "
            "channels, height, width)"
        )
    if padding is None:
        if not all(k % 2 for k in kernel):
            raise ValueError(f"kernel_size: got {kernel}, want odd sizes (or give padding)")
        around = tuple(d * (k - 1) // 2 for k, d in zip(kernel, spread, strict=True))
    else:
        around = pair("padding", padding, least=0)
    size = tuple(int(n) for n in maps.shape[3:])
    out = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(size, around, spread, kernel, step, strict=True)
    )
    if min(out) < 1:
        raise ValueError(f"maps: got size {size}, too small for a kernel of {kernel}")
    y = maps.new_zeros(maps.shape[0], maps.shape[2], *out)
    for tap in range(maps.shape[1]):
        row_and_column = divmod(tap, kernel[1])
        overlaps = [
            _overlap(n, o, d * t - p, s)
            for n, o, d, t, p, s in zip(
                size, out, spread, row_and_column, around, step, strict=True
            )
        ]
        if all(written.start < written.stop for _, written in overlaps):
            (rows, out_rows), (columns, out_columns) = overlaps
            y[:, :, out_rows, out_columns] += maps[:, tap, :, rows, columns]
    return y


def _overlap(size: int, out: int, shift: int, stride: int) -> tuple[slice, slice]:
    """The outputs p whose source stride · p + shift is inside of a map, along one axis.

    Returns:
        The sources, a slice of 0 : size, and the outputs, a slice of 0 : out.
    """
    first = max(0, -(shift // stride))
    last = min(out - 1, (size - 1 - shift) // stride)
    start = stride * first + shift
    return slice(start, start + stride * (last - first) + 1, stride), slice(first, last + 1)


def convolution_by_shifts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Tensor:
    """The same as `torch.nn.functional.conv2d`, computed by 1×1 convolutions, shifts and sums.

    It stores one map per tap, so it is for explanation and for tests, not for speed.

    Args:
        x: [batch, in channels, height, width].
        weight: [out channels, in channels / groups, kernel rows, kernel columns].
        bias: [out channels].
        stride, padding, dilation, groups: as in conv2d.

    Returns:
        [batch, out channels, out height, out width].

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """
    if weight.ndim != 4:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, want (out channels, in channels / groups, "
            "rows, columns)"
        )
    out, inner, rows, columns = weight.shape
    if groups < 1 or out % groups:
        raise ValueError(f"groups: got {groups}, want a divisor of the {out} out channels")
    if x.ndim != 4 or x.shape[1] != groups * inner:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, want (batch, {groups * inner}, height, width)"
        )
    # One 1×1 convolution for all taps. Its output channels are (group, tap, channel), since those
    # of one group have to be consecutive.
    taps = weight.reshape(groups, out // groups, -1, rows * columns)
    stacked = taps.permute(0, 3, 1, 2).reshape(out * rows * columns, -1, 1, 1)
    maps = F.conv2d(x, stacked, groups=groups)
    maps = maps.unflatten(1, (groups, rows * columns, out // groups)).transpose(1, 2).flatten(2, 3)
    y = shift_and_sum(maps, (rows, columns), stride, padding, dilation)
    return y if bias is None else y + bias[:, None, None]


def shift_kernels(kernel_size: Sizes, like: Tensor | None = None) -> Tensor:
    """One kernel per tap, which is one at that tap and zero elsewhere.

    Convolving map t with kernel t, and summing the results, is the same as `shift_and_sum`. The
    learned shifts of ACmix start with these kernels.

    Args:
        kernel_size: an int or (rows, columns).
        like: a tensor whose dtype and device the kernels get. None means torch's defaults.

    Returns:
        [taps, rows, columns], with taps = rows · columns.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """
    rows, columns = kernel = pair("kernel_size", kernel_size)
    taps = kernel[0] * kernel[1]
    eye = torch.eye(taps) if like is None else torch.eye(taps, dtype=like.dtype, device=like.device)
    return eye.reshape(taps, rows, columns)
