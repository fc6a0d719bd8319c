"""ACmix with keys and values copied for every neighbour; the benchmarks compare with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...modules import ACmix2d
from ...modules.convolution_path import coordinates

__all__ = ["unfold_acmix", "unfold_bytes"]


def unfold_acmix(layer: ACmix2d, x: Tensor) -> Tensor:
    """Compute the output of an ACmix layer in the way of the published code.

    Keys, values and positions are unfolded to one copy per neighbour, multiplied and summed. The
    convolution makes one map for each tap of each channel, and shifts and adds these maps.

    Args:
        layer: the layer.
        x: the input [batch, channels, height, width].

    Returns:
        What `layer(x)` returns.
    """
    batch, heads, dim = len(x), layer.heads, layer.head_dim
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    reach = dilation * (kernel - 1) // 2
    maps = layer.project(x)
    q, k, v = (m.reshape(batch * heads, dim, *m.shape[2:]) for m in maps)
    p = layer.position_proj(coordinates(*x.shape[2:], like=x))

    def unfold(m: Tensor) -> Tensor:
        wide = F.pad(m, (reach,) * 4, mode="reflect")
        copies = F.unfold(wide, kernel, dilation=dilation, stride=stride)
        return copies.view(len(m), dim, kernel * kernel, *q.shape[2:])

    q, at = (m[..., ::stride, ::stride] for m in (q * dim**-0.5, p))
    s = (q[:, :, None] * (unfold(k) + at[:, :, None] - unfold(p))).sum(1)
    attention = (s.softmax(1)[:, None] * unfold(v)).sum(2)
    attention = attention.reshape(batch, heads * dim, *q.shape[2:])
    path = layer.convolution
    slices = torch.cat([m.reshape(batch, heads, dim, -1) for m in maps], 1)
    taps = F.conv2d(slices, path.fc.weight[:, :, None, None])
    taps = taps.transpose(1, 2).reshape(batch, -1, *x.shape[2:])
    assert path.shifts is not None
    padding = path.dilation * (path.kernel_size - 1) // 2
    z = F.conv2d(taps, path.shifts, None, stride, padding, path.dilation, dim)
    if not path.grouped_order:
        z = z.unflatten(1, (dim, heads)).transpose(1, 2).flatten(1, 2)
    if path.bias is not None:
        z = z + path.bias[:, None, None]
    return layer.alpha * attention + layer.beta * z


def unfold_bytes(
    batch: int, channels: int, places: int, taps: int, backward: bool, width: int = 4
) -> int:
    """Estimate the peak memory of `unfold_acmix` from its shapes.

    The forward pass holds three tensors of the size of the unfolded keys. The backward pass also
    holds two tensors of this size, which are saved for it or are gradients.

    Args:
        batch: the number of samples.
        channels: the number of channels.
        places: the number of pixels of the output map.
        taps: the number of neighbours of a pixel.
        backward: whether the backward pass is included.
        width: the bytes of a number.

    Returns:
        The number of bytes.
    """
    return (5 if backward else 3) * batch * channels * places * taps * width
