"""ACmix as its paper defines it: attention over a k×k neighbourhood together with a convolution.

`LocalAttention2d` is the attention alone, and `ACmix2d` adds the convolution path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._renamed import foreign_arguments, renamed_arguments
from ..functional import neighborhood_attention
from .checks import check_image, check_int
from .convolution_path import ACmixBase, ConvolutionPath, ImageAttention, coordinates

__all__ = ["ACmix2d", "LocalAttention2d"]

FOREIGN = {
    "dim": "in_channels and out_channels",
    "embed_dim": "in_channels and out_channels",
    "num_heads": "heads",
    "qkv_bias": "bias",
    "is_causal": "SelfAttention with causal=True and a window",
    "rel_pos_bias": "no argument: position_proj always adds a term for the relative position",
}
"""Names that NATTEN has for arguments of neighbourhood attention."""


@renamed_arguments(attention_kernel="kernel_size")
@foreign_arguments(**FOREIGN)
class LocalAttention2d(ImageAttention):
    """Attention of each position over its k×k neighbourhood, with a relative position term.

    s_ij = q_i · (k_j + e_i - e_j) / sqrt(head_dim), where e_i is a linear projection of the two
    coordinates of position i, in [-1, 1], and is the same for all heads. The term q_i · e_i is
    equal for all j and cancels in the softmax, so the scores are computed as q_i · (k_j - e_j), and
    the projection needs no bias. At the borders the map is continued by reflection.

    Args:
        in_channels, out_channels: channels in and out; out_channels is a multiple of heads.
        heads: the number of attention heads.
        kernel_size: size of the neighbourhood, odd.
        stride: the distance of queries; the size of the output is rounded up.
        dilation: the distance of neighbours.
        bias: whether the query, key and value projections have a bias.
        device, dtype: of the parameters, as in torch's own modules.

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
        kernel_size: int = 7,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value in (
            ("in_channels", in_channels), ("out_channels", out_channels), ("heads", heads),
            ("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation),
        ):  # fmt: skip
            check_int(name, value, 1)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: got {kernel_size}, want an odd int")
        if out_channels % heads:
            raise ValueError(f"heads: got {heads}, want a divisor of out_channels {out_channels}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.heads, self.head_dim = heads, out_channels // heads
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Conv2d(in_channels, out_channels, 1, bias=bias, **factory))
        self.position_proj = nn.Conv2d(2, self.head_dim, 1, bias=False, **factory)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        check_image(x, self.in_channels, self.q_proj)
        # Channels-last suits the 1×1 convolutions, the attention and the grouped convolution.
        # (Not through `contiguous(memory_format=...)`, which vmap does not take.)
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # The maps become channels-last first, so that their gradients do so, too.
        q, k, v = (m.permute(0, 2, 3, 1) for m in (query, key, value))
        position = self.position_proj(coordinates(*key.shape[2:], like=key))
        k = k - position.permute(0, 2, 3, 1).repeat(1, 1, 1, self.heads)
        q = q[:, :: self.stride, :: self.stride]
        q, k, v = (m.unflatten(3, (self.heads, -1)).permute(0, 3, 1, 2, 4) for m in (q, k, v))
        y = neighborhood_attention(q, k, v, self.kernel_size, self.stride, self.dilation)
        return y.permute(0, 1, 4, 2, 3).flatten(1, 2)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, heads={self.heads}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}"
        )


@renamed_arguments(conv_kernel="conv_kernel_size")
@foreign_arguments(**FOREIGN)
class ACmix2d(ACmixBase, LocalAttention2d):
    """ACmix: attention over a neighbourhood and a convolution, from the same q, k and v.

    y = α · attention + β · convolution (ACmix, section 4, eqs. 10-12). The convolution turns the
    3 · heads slices of q, k and v into one map per tap, shifts these maps and sums them.

    Args:
        in_channels, out_channels: channels in and out; out_channels is a multiple of heads.
        heads: the number of attention heads.
        kernel_size: size of the attention's neighbourhood, odd.
        conv_kernel_size: size of the convolution's kernel, odd.
        stride, dilation: of both paths; the size of the output is rounded up.
        bias: whether the query, key and value projections and the convolution have a bias.
        learned_shifts: whether the shift kernels of the convolution are parameters.
        published: follow the published code where it differs from the paper, to use weights that
            were trained with it: the convolution has no bias and no dilation, and its channels,
            ordered (channel, head), are added to the attention's, ordered (head, channel), without
            reordering.
        device, dtype: of the parameters, as in torch's own modules.

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
        kernel_size: int = 7,
        conv_kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        learned_shifts: bool = True,
        published: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        LocalAttention2d.__init__(
            self, in_channels, out_channels, heads, kernel_size, stride, dilation, bias, device,
            dtype,
        )  # fmt: skip
        self.add_convolution(
            ConvolutionPath(
                3 * heads,
                self.head_dim,
                out_channels,
                conv_kernel_size,
                stride,
                1 if published else dilation,
                bias=bias and not published,
                learned=learned_shifts,
                grouped_order=published,
                device=device,
                dtype=dtype,
            )
        )
