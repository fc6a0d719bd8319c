"""SAN's patchwise attention, alone and mixed with a convolution (Zhao et al., section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import neighborhood_mix
from ..neighborhoods import Neighborhood
from .acmix import ConvolutionPath, ImageAttention, Mixed
from .checks import check_image, check_int

__all__ = ["PatchwiseACmix2d", "PatchwiseAttention2d"]


class PatchwiseAttention2d(ImageAttention):
    """SAN's patchwise attention: a place's weights come from its whole neighbourhood at once.

    w_i = γ([q_i, k_j for all j of the k×k neighbourhood]), y_i = Σ_j w_ij v_j. γ is batch norm,
    ReLU, a 1×1 convolution to out_channels / share, and once more to k² · out_channels / share: a
    weight per tap, shared by `share` channels. There is no softmax. The borders are reflected.
    (Zhao et al., Exploring Self-attention for Image Recognition, section 3.2, δ concatenation.)

    The neighbourhoods of k, relation_channels wide, are written down; those of v are not.

    Args:
        in_channels: of the image.
        out_channels: of the values and the answer.
        relation_channels: of q and k; out_channels / 4 in SAN.
        share: channels that share a weight, a divisor of out_channels. As in SAN, channel c uses
            the weights c modulo out_channels / share.
        kernel_size: of the neighbourhood, odd.
        stride: of the queries; an odd size is rounded up.
        dilation: distance of the neighbours.

    Attributes:
        q_proj, k_proj, v_proj: nn.Conv2d, 1×1. The first two have no bias (SAN's do): the batch
            norm behind them subtracts it again.
        to_weights: γ, from the channels (q, then k ordered channel, tap) to (group, tap).

    Shapes:
        image [batch, in_channels, height, width] -> [batch, out_channels, out height, out width],
        out = size / stride rounded up.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """

    # what q and k go through next subtracts a bias; ACmix has another use for it
    qk_bias = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        relation_channels: int,
        share: int = 8,
        kernel_size: int = 7,
        stride: int = 1,
        dilation: int = 1,
    ):
        super().__init__()
        for name, value in (
            ("in_channels", in_channels), ("out_channels", out_channels),
            ("relation_channels", relation_channels), ("share", share),
            ("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation),
        ):  # fmt: skip
            check_int(name, value, 1)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: got {kernel_size}, want an odd int")
        if out_channels % share:
            raise ValueError(f"share: got {share}, want a divisor of out_channels {out_channels}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.relation_channels, self.share = relation_channels, share
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.groups, taps = out_channels // share, kernel_size**2
        self.q_proj = nn.Conv2d(in_channels, relation_channels, 1, bias=self.qk_bias)
        self.k_proj = nn.Conv2d(in_channels, relation_channels, 1, bias=self.qk_bias)
        self.v_proj = nn.Conv2d(in_channels, out_channels, 1)
        relation = relation_channels * (1 + taps)
        self.to_weights = nn.Sequential(
            nn.BatchNorm2d(relation),
            nn.ReLU(),
            nn.Conv2d(relation, self.groups, 1, bias=False),
            nn.BatchNorm2d(self.groups),
            nn.ReLU(),
            nn.Conv2d(self.groups, taps * self.groups, 1),
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        check_image(x, self.in_channels, self.q_proj.weight)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = query[..., :: self.stride, :: self.stride]
        relation = torch.cat([query, self._neighborhoods(key)], 1)
        weights = self.to_weights(relation).unflatten(1, (self.groups, self.kernel_size**2))
        return neighborhood_mix(weights, value, self.kernel_size, self.stride, self.dilation)

    def _neighborhoods(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> [batch, channels · taps, out height, out width]."""
        size = (int(x.shape[2]), int(x.shape[3]))
        area = Neighborhood.of(size, self.kernel_size, self.stride, self.dilation)
        for axis in (0, 1):
            x = x.index_select(2 + axis, torch.tensor(area.line(axis), device=x.device))
        taps = F.unfold(x, area.kernel, area.dilation, 0, area.stride)
        return taps.unflatten(2, area.out)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, {self.relation_channels}, "
            f"share={self.share}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}"
        )


class PatchwiseACmix2d(Mixed, PatchwiseAttention2d):
    """ACmix on SAN's patchwise attention: no projection is added, its q, k and v are used twice.

    y = α · attention + β · convolution. Values are wider than q and k, so they enter as
    out_channels / relation_channels slices beside the one of q and the one of k: 6 in SAN. `fc`
    turns them into a map per tap, and the shifts give out_channels / relation_channels outputs per
    relation channel.

    This is inferred: ACmix reports SAN (Pan et al., section 5.1) but its authors released no code
    for it. Of the designs that were counted it comes nearest to the paper's parameters and
    multiply-adds together (`translution.models.san`).

    Args:
        in_channels, out_channels, share, stride, dilation: as in `PatchwiseAttention2d`.
        relation_channels: a divisor of out_channels.
        kernel_size: of the attention's neighbourhood.
        conv_kernel: size of the convolution's kernel, odd.
        bias: on the convolution. Useless where batch norm follows.
        learned_shifts: whether the convolution's shifts may become other kernels.

    Attributes:
        q_proj, k_proj, v_proj: nn.Conv2d, 1×1, with bias: the convolution uses them.
        to_weights: as in `PatchwiseAttention2d`.
        convolution: `ConvolutionPath`.
        alpha, beta: scalars that start at one half.

    Shapes:
        image [batch, in_channels, height, width] -> [batch, out_channels, out height, out width],
        out = size / stride rounded up.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """

    qk_bias = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        relation_channels: int,
        share: int = 8,
        kernel_size: int = 7,
        conv_kernel: int = 3,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        learned_shifts: bool = True,
    ):
        PatchwiseAttention2d.__init__(
            self, in_channels, out_channels, relation_channels, share, kernel_size, stride, dilation
        )
        if out_channels % relation_channels:
            raise ValueError(
                f"relation_channels: got {relation_channels}, want a divisor of out_channels "
                f"{out_channels}"
            )
        self.mix(
            ConvolutionPath(
                2 + out_channels // relation_channels,
                relation_channels,
                out_channels,
                conv_kernel,
                stride,
                dilation,
                bias=bias,
                learned=learned_shifts,
            )
        )
