"""SAN's patchwise attention (Zhao et al., section 3.2), and its ACmix."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._renamed import renamed_arguments
from ..functional import neighborhood_mix
from ..neighborhoods import Neighborhood
from .checks import check_image, check_int
from .convolution_path import ACmixBase, ConvolutionPath, ImageAttention

__all__ = ["PatchwiseACmix2d", "PatchwiseAttention2d"]


@renamed_arguments(share="group_size")
class PatchwiseAttention2d(ImageAttention):
    """SAN's patchwise attention: the weights of a position depend on its whole neighbourhood.

    w_i = γ([q_i, k_j for all j of the k×k neighbourhood]), y_i = Σ_j w_ij v_j. γ is batch norm,
    ReLU and a 1×1 convolution to out_channels / group_size channels, and the same once more to
    k² · out_channels / group_size: one weight per tap, which `group_size` channels share. There is
    no softmax. At the borders the map is continued by reflection. (Zhao et al., Exploring
    Self-attention for Image Recognition, section 3.2, with δ concatenation.)

    The neighbourhoods of k, with relation_channels channels, are copied side by side as γ needs
    them; those of v, which is wider, are not.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the values and of the output.
        relation_channels: channels of q and k; out_channels / 4 in SAN.
        group_size: the number of channels that share a weight, a divisor of out_channels. As in
            SAN, channel c uses the weights number c modulo out_channels / group_size.
        kernel_size: size of the neighbourhood, odd.
        stride: the distance of queries; the size of the output is rounded up.
        dilation: the distance of neighbours.
        device, dtype: of the parameters, as in torch's own modules.

    Attributes:
        q_proj, k_proj, v_proj: nn.Conv2d, 1×1. The first two have no bias (SAN's have one), because
            the batch norm that follows would subtract it.
        to_weights: γ, from the channels (q, then k ordered channel, tap) to (group, tap).

    Shapes:
        image [batch, in_channels, height, width] -> [batch, out_channels, out height, out width],
        out = size / stride rounded up.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """

    # Batch norm, which follows q and k, subtracts a bias. In ACmix the convolution uses it.
    qk_bias = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        relation_channels: int,
        group_size: int = 8,
        kernel_size: int = 7,
        stride: int = 1,
        dilation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value in (
            ("in_channels", in_channels), ("out_channels", out_channels),
            ("relation_channels", relation_channels), ("group_size", group_size),
            ("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation),
        ):  # fmt: skip
            check_int(name, value, 1)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: got {kernel_size}, want an odd int")
        if out_channels % group_size:
            raise ValueError(
                f"group_size: got {group_size}, want a divisor of out_channels {out_channels}"
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.relation_channels, self.group_size = relation_channels, group_size
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.groups, taps = out_channels // group_size, kernel_size**2
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Conv2d(in_channels, relation_channels, 1, bias=self.qk_bias, **factory)
        self.k_proj = nn.Conv2d(in_channels, relation_channels, 1, bias=self.qk_bias, **factory)
        self.v_proj = nn.Conv2d(in_channels, out_channels, 1, **factory)
        relation = relation_channels * (1 + taps)
        self.to_weights = nn.Sequential(
            nn.BatchNorm2d(relation, **factory),
            nn.ReLU(),
            nn.Conv2d(relation, self.groups, 1, bias=False, **factory),
            nn.BatchNorm2d(self.groups, **factory),
            nn.ReLU(),
            nn.Conv2d(self.groups, taps * self.groups, 1, **factory),
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        check_image(x, self.in_channels, self.q_proj)
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
            f"group_size={self.group_size}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}"
        )


@renamed_arguments(conv_kernel="conv_kernel_size")
class PatchwiseACmix2d(ACmixBase, PatchwiseAttention2d):
    """ACmix with SAN's patchwise attention: the convolution uses the same q, k and v once more.

    y = α · attention + β · convolution. Values have more channels than q and k, so they make
    out_channels / relation_channels slices beside one of q and one of k: 6 slices in SAN. `fc`
    turns these into one map per tap, and the shift kernels give out_channels / relation_channels
    outputs per relation channel.

    This is a reconstruction: ACmix reports SAN (Pan et al., section 5.1), but its authors released
    no code for it. Of several designs it comes closest to the paper's parameters and multiply-adds
    together (see the table in `translution.models.self_attention_network`).

    Args:
        in_channels, out_channels, group_size, stride, dilation, device, dtype: as in
            `PatchwiseAttention2d`.
        relation_channels: channels of q and k, a divisor of out_channels.
        kernel_size: size of the attention's neighbourhood, odd.
        conv_kernel_size: size of the convolution's kernel, odd.
        bias: whether the convolution has a bias. Batch norm after the layer would subtract it.
        learned_shifts: whether the shift kernels of the convolution are parameters.

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
        group_size: int = 8,
        kernel_size: int = 7,
        conv_kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        learned_shifts: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        PatchwiseAttention2d.__init__(
            self, in_channels, out_channels, relation_channels, group_size, kernel_size, stride,
            dilation, device, dtype,
        )  # fmt: skip
        if out_channels % relation_channels:
            raise ValueError(
                f"relation_channels: got {relation_channels}, want a divisor of out_channels "
                f"{out_channels}"
            )
        self.add_convolution(
            ConvolutionPath(
                2 + out_channels // relation_channels,
                relation_channels,
                out_channels,
                conv_kernel_size,
                stride,
                dilation,
                bias=bias,
                learned=learned_shifts,
                device=device,
                dtype=dtype,
            )
        )
