"""A convolution taken apart: k² 1×1 convolutions, whose results are shifted and summed.

A k×k convolution multiplies each place by one matrix per tap and adds what it got from the
neighbours. So the multiplications can come first, at every place and for all taps at once (a 1×1
convolution to k² maps), and the neighbourhood later, as shifts and sums of those maps that multiply
nothing. (ACmix, section 3.1, eqs. 2-5.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..neighborhoods import Sizes, pair

__all__ = ["convolution_by_shifts", "shift_and_sum", "shift_kernels"]


def shift_and_sum(
    maps: Tensor,
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Sizes | None = None,
    dilation: Sizes = 1,
) -> Tensor:
    """Shift the map of each tap by the tap's offset, zeros coming in from outside; add them up.

    `y[p] = Σ_t maps[t][stride · p + dilation · t - padding]`, with t the taps (row, column) of the
    kernel, row-major.

    Args:
        maps: [batch, taps, channels, height, width], taps = the kernel's rows times its columns.
        kernel_size, stride, dilation: an int or (rows, columns).
        padding: zeros around the maps; None is dilation · (kernel_size - 1) / 2, which keeps the
            size at stride 1 and needs odd kernels.

    Returns:
        [batch, channels, out height, out width], sizes as of nn.Conv2d.

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
        at = divmod(tap, kernel[1])
        cuts = [
            _overlap(n, o, d * t - p, s)
            for n, o, d, t, p, s in zip(size, out, spread, at, around, step, strict=True)
        ]
        if all(to.start < to.stop for _, to in cuts):
            (rows, to_rows), (columns, to_columns) = cuts
            y[:, :, to_rows, to_columns] += maps[:, tap, :, rows, columns]
    return y


def _overlap(size: int, out: int, shift: int, stride: int) -> tuple[slice, slice]:
    """The places read, and those written, for outputs p whose source stride · p + shift exists."""
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
    """What `torch.nn.functional.conv2d` gives, by 1×1 convolutions, shifts and sums.

    It holds a map per tap, so it is for understanding and for tests.

    Args:
        x: [batch, in channels, height, width].
        weight: [out channels, in channels / groups, kernel rows, kernel columns].
        bias: [out channels].
        stride, padding, dilation, groups: as in conv2d.

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
    # one 1×1 convolution for all taps; the groups stay outermost
    taps = weight.reshape(groups, out // groups, -1, rows * columns)
    stacked = taps.permute(0, 3, 1, 2).reshape(out * rows * columns, -1, 1, 1)
    maps = F.conv2d(x, stacked, groups=groups)
    maps = maps.unflatten(1, (groups, rows * columns, out // groups)).transpose(1, 2).flatten(2, 3)
    y = shift_and_sum(maps, (rows, columns), stride, padding, dilation)
    return y if bias is None else y + bias[:, None, None]


def shift_kernels(kernel_size: Sizes, like: Tensor | None = None) -> Tensor:
    """[taps, rows, columns]: kernels that are one at their own tap and zero elsewhere.

    Convolving map t with kernel t, and summing, is `shift_and_sum`: this is how ACmix's learned
    shifts start.

    Args:
        kernel_size: an int or (rows, columns).
        like: a tensor whose dtype and device the kernels have; None is torch's defaults.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """
    rows, columns = kernel = pair("kernel_size", kernel_size)
    taps = kernel[0] * kernel[1]
    eye = torch.eye(taps) if like is None else torch.eye(taps, dtype=like.dtype, device=like.device)
    return eye.reshape(taps, rows, columns)
