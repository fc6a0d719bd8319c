"""What all forms of ACmix have in common: the convolution path and the sum of both paths.

ACmix is y = α · attention + β · convolution, where both are computed from the same query, key and
value projections (Pan et al., section 4). The attention differs from backbone to backbone:
`acmix.py`, `window.py`, `reduced.py` and `patchwise.py` each have one, alone and as ACmix.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..functional import shift_and_sum, shift_kernels

__all__ = [
    "ACmixBase",
    "ConvolutionPath",
    "ImageAttention",
    "coordinates",
    "pad_to_multiple",
    "upsample_nearest",
]


class ImageAttention(nn.Module):
    """Attention over an image in two steps, `project` and `attend`, so that ACmix can use the
    projected maps a second time."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The query, key and value maps, [batch, channels, height, width] each."""
        raise NotImplementedError

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The output of the attention, from the maps that `project` returns."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Mix an image [batch, channels, height, width]; the class gives the output's shape."""
        return self.attend(*self.project(x))


class ConvolutionPath(nn.Module):
    """The convolution of ACmix: slices of q, k and v become one map per tap, shifted and summed.

    The channels of q, k and v are divided into slices of `channels` channels each, one per head.
    Channel c of all slices together is group c. `fc`, the same for all groups, turns the slices of
    a group into one map per tap of the kernel. These maps are convolved to out_channels / channels
    outputs by kernels that start as pure shifts (`shift_kernels`), so that a new layer sums shifted
    maps and training can learn other kernels. Both steps are linear and follow each other directly,
    so they are computed as one grouped convolution where that needs fewer multiplications. If `fc`
    is anything but a plain nn.Linear (an adapter, a quantised layer, a layer with hooks or a
    parametrisation), it is called as a module instead.

    Args:
        slices: the number of slices, 3 · heads in the paper.
        channels: channels of a slice, and the number of groups; head_dim in the paper.
        out_channels: a multiple of channels.
        kernel_size: odd.
        stride, dilation: of the convolution.
        bias: whether a bias is added to the output.
        fc_bias: whether `fc` has a bias. It is added before the shifts, which still bring in zeros
            at the borders.
        learned: whether the shift kernels are parameters. If not, the shifted maps are summed as
            they are, and all outputs of a group are equal.
        grouped_order: the order of the output channels: (group, output of the group), as a grouped
            convolution gives them, or by default (output, group), the order of attention's heads.
        device, dtype: of the parameters.

    Attributes:
        fc: nn.Linear, from slices to taps.
        shifts: nn.Parameter [out_channels, taps, kernel_size, kernel_size], where learned.
        bias: nn.Parameter [out_channels].

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """

    def __init__(
        self,
        slices: int,
        channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        fc_bias: bool = False,
        learned: bool = True,
        grouped_order: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"conv_kernel_size: got {kernel_size!r}, want an odd int of at least 1"
            )
        if out_channels % channels:
            raise ValueError(f"out_channels: got {out_channels}, want a multiple of {channels}")
        self.slices, self.channels, self.out_channels = slices, channels, out_channels
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.grouped_order = grouped_order
        taps, self.outputs_per_group = kernel_size**2, out_channels // channels
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc = nn.Linear(slices, taps, bias=fc_bias, **factory)
        self.shifts: nn.Parameter | None = None
        if learned:
            kernels = shift_kernels(kernel_size, like=self.fc.weight.detach())
            self.shifts = nn.Parameter(kernels.repeat(out_channels, 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels, **factory)) if bias else None
        # multiplications per position and channel, as one convolution and as two steps
        at_once = slices * self.outputs_per_group * taps
        self.at_once = learned and at_once <= slices * taps + taps * self.outputs_per_group * taps

    def forward(
        self,
        *maps: Tensor,
        coarse: tuple[Tensor, ...] = (),
        factor: int = 1,
        multiplier: Tensor | None = None,
    ) -> Tensor:
        """The convolution path of some maps, [batch, out_channels, out height, out width].

        Args:
            maps: [batch, n · channels, height, width] each, with n slices in each map.
            coarse: the maps of the last slices where these are `factor` times smaller (rounded
                up). They are upsampled: each position is repeated factor × factor times.
            factor: as `coarse` says.
            multiplier: a number that the result is multiplied by. It is applied to the kernels,
                which are small, instead of the maps.

        All maps together have `slices` slices.
        """
        scale = 1.0 if multiplier is None else multiplier
        shifts = None if self.shifts is None else self.shifts * scale
        bias = None if self.bias is None else self.bias * scale
        if shifts is not None and self.at_once and _is_plain_linear(self.fc):
            size = maps[0].shape[2:]
            maps += tuple(upsample_nearest(m, factor, 2)[..., : size[0], : size[1]] for m in coarse)
            y = self._convolved_at_once(self._slices(maps), shifts)
        elif shifts is not None:
            mapped = self._mapped(maps, coarse, factor).flatten(3).permute(0, 3, 1, 2)
            y = F.conv2d(
                mapped, shifts.to(mapped.dtype), None, *self._conv_arguments(), groups=self.channels
            )
        else:
            mapped = self._mapped(maps, coarse, factor).permute(0, 4, 3, 1, 2)
            y = shift_and_sum(mapped, self.kernel_size, self.stride, dilation=self.dilation)
            y = y.repeat_interleave(self.outputs_per_group, 1) * scale
        if not self.grouped_order and self.outputs_per_group > 1:
            y = y.permute(0, 2, 3, 1).unflatten(3, (self.channels, self.outputs_per_group))
            y = y.transpose(3, 4).flatten(3).permute(0, 3, 1, 2)
        return y if bias is None else y + bias.to(y.dtype)[:, None, None]

    def _conv_arguments(self) -> tuple[int, int, int]:
        """Stride, padding and dilation of the convolution."""
        return self.stride, self.dilation * (self.kernel_size - 1) // 2, self.dilation

    def _slices(self, maps: tuple[Tensor, ...]) -> Tensor:
        """The slices of each group beside each other, [batch, height, width, channels, slices]."""
        # The maps become channels-last before they are divided, so that gradients do so, too.
        last = [m.permute(0, 2, 3, 1).unflatten(3, (-1, self.channels)) for m in maps]
        return torch.cat([m.transpose(3, 4) for m in last], -1)

    def _mapped(self, maps: tuple[Tensor, ...], coarse: tuple[Tensor, ...], factor: int) -> Tensor:
        """The map of each tap, [batch, height, width, channels, taps]: `fc` of the slices."""
        if coarse and not _is_plain_linear(self.fc):
            size = maps[0].shape[2:]
            maps += tuple(upsample_nearest(m, factor, 2)[..., : size[0], : size[1]] for m in coarse)
            coarse = ()
        x = self._slices(maps)
        if not coarse:
            return self.fc(x)
        # fc is linear, so the coarse slices can go through it before they are upsampled.
        fine = x.shape[-1]
        y = F.linear(x, self.fc.weight[:, :fine], self.fc.bias)
        z = F.linear(self._slices(coarse), self.fc.weight[:, fine:])
        return y + upsample_nearest(z, factor, 1)[:, : x.shape[1], : x.shape[2]]

    def _convolved_at_once(self, x: Tensor, shifts: Tensor) -> Tensor:
        # The two weights are multiplied in their own dtype, which autocast would change.
        weight = torch.einsum("otij,ts->osij", shifts, self.fc.weight.to(shifts.dtype))
        folded = x.flatten(3).permute(0, 3, 1, 2)
        y = F.conv2d(
            folded, weight.to(x.dtype), None, *self._conv_arguments(), groups=self.channels
        )
        if self.fc.bias is None:
            return y
        # fc's bias is a constant map per tap; at the borders the shifts bring in zeros.
        ones = x.new_ones(1, 1, *x.shape[1:3])
        constant = torch.einsum("otij,t->oij", shifts, self.fc.bias.to(shifts.dtype))[:, None]
        return y + F.conv2d(ones, constant.to(x.dtype), None, *self._conv_arguments())

    def extra_repr(self) -> str:
        return (
            f"slices={self.slices}, channels={self.channels}, out_channels={self.out_channels}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"
        )


def _is_plain_linear(layer: nn.Module) -> bool:
    """Whether calling the layer does nothing but multiply by its weight and add its bias."""
    forward = layer._forward_hooks, layer._forward_pre_hooks
    hooks = (*forward, layer._backward_hooks, layer._backward_pre_hooks)
    plain = type(layer) is nn.Linear and "forward" not in vars(layer) and not any(hooks)
    return plain and not is_traceable_wrapper_subclass(layer.weight)  # as torchao's weights are


class ACmixBase(ImageAttention):
    """Turns an `ImageAttention` into ACmix, y = α · attention + β · convolution.

    A form of ACmix inherits from this class and from its attention, in this order.

    Attributes:
        alpha, beta: nn.Parameter, scalars that start at one half.
        convolution: a `ConvolutionPath` of the maps that the attention projects.
    """

    alpha: nn.Parameter
    beta: nn.Parameter
    convolution: ConvolutionPath

    def add_convolution(self, convolution: ConvolutionPath) -> None:
        """Add the second path; the subclass's __init__ ends with this call."""
        like = convolution.fc.weight
        self.alpha = nn.Parameter(torch.tensor(0.5, device=like.device, dtype=like.dtype))
        self.beta = nn.Parameter(torch.tensor(0.5, device=like.device, dtype=like.dtype))
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        """α · attention + β · convolution of an image [batch, channels, height, width]."""
        maps = self.project(x)
        y, z = self.attend(*maps), self.convolve(*maps, multiplier=self.beta)
        return torch.addcmul(z, y, self.alpha.to(y.dtype))

    def convolve(
        self, query: Tensor, key: Tensor, value: Tensor, multiplier: Tensor | None = None
    ) -> Tensor:
        """The output of the convolution path alone, multiplied by `multiplier`."""
        return self.convolution(query, key, value, multiplier=multiplier)


def pad_to_multiple(x: Tensor, rows: int, columns: int) -> Tensor:
    """Pad x [batch, channels, height, width] with zeros below and to the right, so that its height
    is a multiple of `rows` and its width one of `columns`."""
    more = -x.shape[2] % rows, -x.shape[3] % columns
    return F.pad(x, (0, more[1], 0, more[0])) if any(more) else x


def upsample_nearest(x: Tensor, factor: int, axis: int) -> Tensor:
    """Repeat each position factor × factor times, on `axis` and the axis after it."""
    return x.repeat_interleave(factor, axis).repeat_interleave(factor, axis + 1)


def coordinates(height: int, width: int, like: Tensor) -> Tensor:
    """Column and row of each position, from -1 to 1: [1, 2, height, width]."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    rows, columns = (
        torch.linspace(-1, 1, n, device=like.device, dtype=wide).to(like.dtype)
        for n in (height, width)
    )
    return torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)])[None]
