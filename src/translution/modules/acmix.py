"""ACmix: attention and convolution fed by one set of query, key and value projections.

y = α · attention + β · convolution (Pan et al., section 4). The attention differs from backbone to
backbone: `local.py`, `window.py`, `reduced.py` and `patchwise.py` have one each, alone and mixed.
The convolution path, and what the mixed ones have in common, is here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import shift_and_sum, shift_kernels

__all__ = ["ConvolutionPath", "ImageAttention", "Mixed"]


class ImageAttention(nn.Module):
    """Attention over an image [batch, channels, height, width], in two steps that ACmix shares."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The maps of queries, keys and values, [batch, channels, height, width] each."""
        raise NotImplementedError

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The attention's answer from the maps of `project`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The image, mixed: [batch, channels, height, width] in and out, as the class says."""
        return self.attend(*self.project(x))


class ConvolutionPath(nn.Module):
    """The convolution of ACmix: from slices of q, k and v to one map per tap, shifted and summed.

    Each of `channels` channels is a group. `fc`, the same for all groups, turns the slices of a
    group into one map per tap of the kernel. The maps of a group are then convolved to
    out_channels / channels outputs by kernels that start as pure shifts (`shift_kernels`), so that
    a new layer sums shifted maps and training may learn other kernels. Both steps are linear and
    nothing stands between them, so they run as one grouped convolution where that is cheaper.

    Args:
        slices: maps per channel that come in, 3 · heads in the paper.
        channels: groups, head_dim in the paper.
        out_channels: a multiple of channels.
        kernel_size: odd.
        stride, dilation: of the shifts.
        bias: added to the output.
        fc_bias: added to the maps before they are shifted (zeros still come in at the borders).
        learned: whether the shift kernels are learned. False sums the shifted maps as they are,
            and every output of a group is the same.
        grouped_order: outputs ordered (channel, output of the group), as a grouped convolution
            gives them; else (output, channel), the order of attention's heads.

    Attributes:
        fc: nn.Linear, slices -> taps.
        shifts: nn.Parameter [out_channels, taps, kernel_size, kernel_size], where learned.
        bias: nn.Parameter [out_channels].
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
    ):
        super().__init__()
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel: got {kernel_size!r}, want an odd int of at least 1")
        if out_channels % channels:
            raise ValueError(f"out_channels: got {out_channels}, want a multiple of {channels}")
        self.slices, self.channels, self.out_channels = slices, channels, out_channels
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.grouped_order = grouped_order
        taps, self.each = kernel_size**2, out_channels // channels
        self.fc = nn.Linear(slices, taps, bias=fc_bias)
        self.shifts: nn.Parameter | None = None
        if learned:
            self.shifts = nn.Parameter(shift_kernels(kernel_size).repeat(out_channels, 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        # multiplications per place and channel, in one step and in two
        at_once = slices * self.each * taps
        self.at_once = learned and at_once <= slices * taps + taps * self.each * taps

    def forward(
        self,
        *maps: Tensor,
        coarse: tuple[Tensor, ...] = (),
        factor: int = 1,
        times: Tensor | None = None,
    ) -> Tensor:
        """Maps [batch, slices of its own · channels, height, width], all slices together `slices`
        -> [batch, out_channels, out height, out width].

        `coarse` are the maps of the last slices where these are `factor` times smaller (rounded
        up): each of their places stands for factor × factor places (nearest upsampling). `times`
        is a number for the answer to be multiplied by; it goes into the kernels, which are small.
        """
        scale = 1.0 if times is None else times
        shifts = None if self.shifts is None else self.shifts * scale
        bias = None if self.bias is None else self.bias * scale
        if shifts is not None and self.at_once:
            size = maps[0].shape[2:]
            maps += tuple(repeated(m, factor, 2)[..., : size[0], : size[1]] for m in coarse)
            y = self._convolved_at_once(self._slices(maps), shifts)
        elif shifts is not None:
            mapped = self._mapped(maps, coarse, factor).flatten(3).permute(0, 3, 1, 2)
            y = F.conv2d(
                mapped, shifts.to(mapped.dtype), None, *self._along(), groups=self.channels
            )
        else:
            mapped = self._mapped(maps, coarse, factor).permute(0, 4, 3, 1, 2)
            y = shift_and_sum(mapped, self.kernel_size, self.stride, dilation=self.dilation)
            y = y.repeat_interleave(self.each, 1) * scale
        if not self.grouped_order and self.each > 1:
            y = y.permute(0, 2, 3, 1).unflatten(3, (self.channels, self.each))
            y = y.transpose(3, 4).flatten(3).permute(0, 3, 1, 2)
        return y if bias is None else y + bias.to(y.dtype)[:, None, None]

    def _along(self) -> tuple[int, int, int]:
        return self.stride, self.dilation * (self.kernel_size - 1) // 2, self.dilation

    def _slices(self, maps: tuple[Tensor, ...]) -> Tensor:
        """[batch, height, width, channels, slices]: a group's inputs beside each other."""
        # channels last before they are divided, so that going back gradients lie so as well
        last = [m.permute(0, 2, 3, 1).unflatten(3, (-1, self.channels)) for m in maps]
        return torch.cat([m.transpose(3, 4) for m in last], -1)

    def _mapped(self, maps: tuple[Tensor, ...], coarse: tuple[Tensor, ...], factor: int) -> Tensor:
        """[batch, height, width, channels, taps]: through `fc`, a map per tap."""
        x = self._slices(maps)
        if not coarse:
            return self.fc(x)
        # fc is linear: what it does to the coarse slices is computed before they are upsampled
        fine = x.shape[-1]
        y = F.linear(x, self.fc.weight[:, :fine], self.fc.bias)
        z = F.linear(self._slices(coarse), self.fc.weight[:, fine:])
        return y + repeated(z, factor, 1)[:, : x.shape[1], : x.shape[2]]

    def _convolved_at_once(self, x: Tensor, shifts: Tensor) -> Tensor:
        # autocast would round the product of two weights as well: fold in their own dtype
        weight = torch.einsum("otij,ts->osij", shifts, self.fc.weight.to(shifts.dtype))
        folded = x.flatten(3).permute(0, 3, 1, 2)
        y = F.conv2d(folded, weight.to(x.dtype), None, *self._along(), groups=self.channels)
        if self.fc.bias is None:
            return y
        # a constant map of each tap's bias, with zeros coming in at the borders
        ones = x.new_ones(1, 1, *x.shape[1:3])
        constant = torch.einsum("otij,t->oij", shifts, self.fc.bias.to(shifts.dtype))[:, None]
        return y + F.conv2d(ones, constant.to(x.dtype), None, *self._along())

    def extra_repr(self) -> str:
        return (
            f"slices={self.slices}, channels={self.channels}, out_channels={self.out_channels}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"
        )


class Mixed(ImageAttention):
    """Mixed into an attention, makes it ACmix: y = α · attention + β · convolution.

    Attributes:
        alpha, beta: nn.Parameter, scalars that start at one half.
        convolution: `ConvolutionPath`, fed by the maps that the attention projects.
    """

    alpha: nn.Parameter
    beta: nn.Parameter
    convolution: ConvolutionPath

    def mix(self, convolution: ConvolutionPath) -> None:
        """To be called at the end of a mixed module's __init__."""
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.beta = nn.Parameter(torch.tensor(0.5))
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        """α · attention + β · convolution of the image [batch, channels, height, width]."""
        maps = self.project(x)
        y, z = self.attend(*maps), self.convolve(*maps, times=self.beta)
        return torch.addcmul(z, y, self.alpha.to(y.dtype))

    def convolve(
        self, query: Tensor, key: Tensor, value: Tensor, times: Tensor | None = None
    ) -> Tensor:
        """The convolution path alone, multiplied by `times`."""
        return self.convolution(query, key, value, times=times)


def filled(x: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros below and to the right, up to a multiple of so many rows and columns."""
    more = -x.shape[2] % rows, -x.shape[3] % columns
    return F.pad(x, (0, more[1], 0, more[0])) if any(more) else x


def repeated(x: Tensor, factor: int, axis: int) -> Tensor:
    """Each place factor × factor times, on `axis` and the one after it."""
    return x.repeat_interleave(factor, axis).repeat_interleave(factor, axis + 1)


def unit_position(height: int, width: int, like: Tensor) -> Tensor:
    """[1, 2, height, width]: column and row of each place, from -1 to 1."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    rows, columns = (
        torch.linspace(-1, 1, n, device=like.device, dtype=wide).to(like.dtype)
        for n in (height, width)
    )
    return torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)])[None]
