"""Attention over a k×k neighbourhood, alone and mixed with a convolution: ACmix's own form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional import neighborhood_attention
from .acmix import ConvolutionPath, ImageAttention, Mixed, unit_position
from .checks import check_image, check_int

__all__ = ["ACmix2d", "LocalAttention2d"]


class LocalAttention2d(ImageAttention):
    """Attention of each place over its k×k neighbourhood, with a relative position term.

    s_ij = q_i · (k_j + p_i - p_j) / sqrt(head_dim), with p a projection of the two coordinates in
    [-1, 1], the same for all heads. q_i · p_i is equal for all j and cancels in the softmax, so
    the scores are q_i · (k - p)_j, and p needs no bias. The borders are reflected.

    Args:
        in_channels, out_channels: heads must divide out_channels.
        heads: of the attention.
        attention_kernel: size of the neighbourhood, odd.
        stride: of the queries; an odd size is rounded up.
        dilation: distance of the neighbours.
        bias: on the query, key and value projections.

    Attributes:
        q_proj, k_proj, v_proj: nn.Conv2d, 1×1.
        position_proj: nn.Conv2d, 1×1, from the coordinates (column, row) to head_dim.

    Shapes:
        image [batch, in_channels, height, width] -> [batch, out_channels, out height, out width],
        out = size / stride rounded up.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """

    q_proj: nn.Conv2d
    k_proj: nn.Conv2d
    v_proj: nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        heads: int = 4,
        attention_kernel: int = 7,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
    ):
        super().__init__()
        for name, value in (
            ("in_channels", in_channels), ("out_channels", out_channels), ("heads", heads),
            ("attention_kernel", attention_kernel), ("stride", stride), ("dilation", dilation),
        ):  # fmt: skip
            check_int(name, value, 1)
        if attention_kernel % 2 == 0:
            raise ValueError(f"attention_kernel: got {attention_kernel}, want an odd int")
        if out_channels % heads:
            raise ValueError(f"heads: got {heads}, want a divisor of out_channels {out_channels}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.heads, self.head_dim = heads, out_channels // heads
        self.attention_kernel, self.stride, self.dilation = attention_kernel, stride, dilation
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Conv2d(in_channels, out_channels, 1, bias=bias))
        self.position_proj = nn.Conv2d(2, self.head_dim, 1, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        check_image(x, self.in_channels, self.q_proj.weight)
        # channels last: the layout that 1×1 convolutions, attention and grouped convolution share
        x = x.contiguous(memory_format=torch.channels_last)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # channels stand last from the first step, so that going back gradients lie so as well
        q, k, v = (m.permute(0, 2, 3, 1) for m in (query, key, value))
        position = self.position_proj(unit_position(*key.shape[2:], like=key))
        k = k - position.permute(0, 2, 3, 1).repeat(1, 1, 1, self.heads)
        q = q[:, :: self.stride, :: self.stride]
        q, k, v = (m.unflatten(3, (self.heads, -1)).permute(0, 3, 1, 2, 4) for m in (q, k, v))
        y = neighborhood_attention(q, k, v, self.attention_kernel, self.stride, self.dilation)
        return y.permute(0, 1, 4, 2, 3).flatten(1, 2)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, heads={self.heads}, "
            f"attention_kernel={self.attention_kernel}, stride={self.stride}, "
            f"dilation={self.dilation}"
        )


class ACmix2d(Mixed, LocalAttention2d):
    """ACmix: attention over a neighbourhood and a convolution, from the same q, k and v.

    y = α · attention + β · convolution (ACmix, section 4, eqs. 10-12). The convolution takes
    3 · heads slices of q, k and v apart into a map per tap, shifts and sums them.

    Args:
        in_channels, out_channels: heads must divide out_channels.
        heads: of the attention.
        attention_kernel: size of the attention's neighbourhood, odd.
        conv_kernel: size of the convolution's kernel, odd.
        stride, dilation: of both paths; an odd size is rounded up.
        bias: on the query, key and value projections and on the convolution.
        learned_shifts: whether the convolution's shifts may become other kernels.
        published: agree with the published code where it differs from the paper, to use weights
            trained with it: the convolution has no bias and no dilation, and its outputs, ordered
            (channel, head), are added to the attention's, ordered (head, channel), as they are.

    Attributes:
        q_proj, k_proj, v_proj: nn.Conv2d, 1×1.
        position_proj: nn.Conv2d, 1×1, from the coordinates (column, row) to head_dim.
        convolution: `ConvolutionPath`.
        alpha, beta: scalars that start at one half.

    Shapes:
        image [batch, in_channels, height, width] -> [batch, out_channels, out height, out width],
        out = size / stride rounded up.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        heads: int = 4,
        attention_kernel: int = 7,
        conv_kernel: int = 3,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        learned_shifts: bool = True,
        published: bool = False,
    ):
        LocalAttention2d.__init__(
            self, in_channels, out_channels, heads, attention_kernel, stride, dilation, bias
        )
        self.mix(
            ConvolutionPath(
                3 * heads,
                self.head_dim,
                out_channels,
                conv_kernel,
                stride,
                1 if published else dilation,
                bias=bias and not published,
                learned=learned_shifts,
                grouped_order=published,
            )
        )
