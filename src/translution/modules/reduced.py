"""PVT's attention, whose keys and values come from a coarser grid, and its ACmix.

With a reduction of 1 it is ordinary self-attention, and its ACmix the one that ViTs use here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._renamed import renamed_arguments
from ..layouts import Sizes
from .checks import check_dtype, check_grid, check_int, check_tensor
from .convolution_path import ConvolutionPath, pad_to_multiple

__all__ = ["ReducedACmix2d", "ReducedAttention2d"]


class ReducedAttention2d(nn.Module):
    """Attention whose keys and values come from a grid made `reduction` times coarser.

    A convolution of size and stride `reduction` and a layer norm turn reduction² tokens into one,
    which is then projected to a key and a value (pyramid vision transformer, section 3.3, "SRA").
    Where the reduction does not divide a size, the grid is padded with zeros, so that the size of
    the coarse grid is rounded up. With reduction 1 it is ordinary self-attention.

    Args:
        dim: channels of a token.
        grid: rows and columns of the default grid of `forward` (an int for both).
        heads, head_dim: the number of heads and their channels; head_dim defaults to dim / heads.
        reduction: the number of tokens per axis that become one key.
        prefix: the number of tokens before the grid that have no position. They have none in a
            coarser grid either, so they need reduction 1.
        prefix_queries: only the prefix tokens are queries, as in a last layer of which only the
            class token is read.
        dropout: the probability with which an attention weight is dropped in training.
        bias: whether the query, key and value projections have a bias.
        device, dtype: of the parameters, as in torch's own modules.

    Attributes:
        q_proj, k_proj, v_proj, o_proj: nn.Linear.
        reduce, norm: the convolution and the nn.LayerNorm, with a reduction above 1.

    Shapes:
        tokens [batch, prefix + rows · columns, dim], the grid row-major -> the same; with
        `prefix_queries` [batch, prefix, dim].

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """

    def __init__(
        self,
        dim: int,
        grid: Sizes,
        heads: int = 8,
        reduction: int = 1,
        head_dim: int | None = None,
        prefix: int = 0,
        prefix_queries: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value, least in (
            ("dim", dim, 1), ("heads", heads, 1), ("reduction", reduction, 1),
            ("prefix", prefix, 0), ("head_dim", 1 if head_dim is None else head_dim, 1),
        ):  # fmt: skip
            check_int(name, value, least)
        if head_dim is None and dim % heads:
            raise ValueError(f"heads: got {heads}, want a divisor of dim {dim} (or give head_dim)")
        if prefix and reduction > 1:
            raise ValueError(f"prefix: got {prefix}, want 0 with a reduction of {reduction}")
        if prefix_queries and not prefix:
            raise ValueError("prefix_queries: got True, want False without prefix tokens")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: got {dropout}, want at least 0 and less than 1")
        self.dim, self.heads, self.head_dim = dim, heads, head_dim or dim // heads
        self.grid = check_grid(grid)
        self.reduction, self.prefix, self.prefix_queries = reduction, prefix, prefix_queries
        self.dropout = dropout
        inner = self.heads * self.head_dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        # The bias of the keys is the same for all keys and cancels in the softmax, so without a
        # convolution path its gradient is zero.
        self.q_proj = nn.Linear(dim, inner, bias=bias, **factory)
        self.k_proj = nn.Linear(dim, inner, bias=bias, **factory)
        self.v_proj = nn.Linear(dim, inner, bias=bias, **factory)
        self.o_proj = nn.Linear(inner, dim, **factory)
        if reduction > 1:
            self.reduce = nn.Conv2d(dim, dim, reduction, reduction, **factory)
            self.norm = nn.LayerNorm(dim, **factory)

    def forward(self, x: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Mix the tokens x, on the grid that the layer was made for or another one."""
        return self.attend(*self.project(x, self._checked(x, grid)))

    def project(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [batch, queries, inner], and keys and values [batch, keys, inner], where inner is
        heads · head_dim."""
        query, source = x[:, : self.prefix] if self.prefix_queries else x, x
        if self.reduction > 1:
            image = x.transpose(1, 2).unflatten(2, grid)
            source = self.reduce(pad_to_multiple(image, self.reduction, self.reduction))
            source = self.norm(source.flatten(2).transpose(1, 2))
        return self.q_proj(query), self.k_proj(source), self.v_proj(source)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The output of the attention, after its output projection: [batch, queries, dim]."""
        q, k, v = (m.unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """The attention weights [batch, heads, queries, keys]; `forward` does not compute them."""
        query, key, _ = self.project(x, self._checked(x, grid))
        q, k = (m.unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (query, key))
        return (q * self.head_dim**-0.5 @ k.transpose(-1, -2)).softmax(-1)

    def _checked(self, x: Tensor, grid: Sequence[int] | None) -> tuple[int, int]:
        height, width = self.grid if grid is None else check_grid(grid)
        tokens = self.prefix + height * width
        check_tensor("x", x, "(batch, tokens, dim)")
        fits = x.ndim == 3 and x.shape[1] == tokens and x.shape[2] == self.dim
        if not fits or not x.dtype.is_floating_point:
            also = f" after {self.prefix} prefix tokens" if self.prefix else ""
            raise ValueError(
                f"x: got {x.dtype} of shape {tuple(x.shape)}, want floating point of shape (batch, "
                f"{tokens}, {self.dim}) for the grid {(height, width)}{also} (another grid is "
                "given as grid=)"
            )
        check_dtype("x", x, self.q_proj)
        return height, width

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, grid={self.grid}, heads={self.heads}, head_dim={self.head_dim}, "
            f"reduction={self.reduction}, prefix={self.prefix}, "
            f"prefix_queries={self.prefix_queries}"
        )


@renamed_arguments(conv_kernel="conv_kernel_size")
class ReducedACmix2d(ReducedAttention2d):
    """Spatially reduced attention and a convolution, from the same q, k and v: PVT's ACmix.

    y = α · o_proj(attention) + β · convolution (ACmix, section 4). The authors name PVT as a
    backbone and released no code for it, so how the two paths are joined is a reconstruction: of
    several designs, this one comes closest to the paper's parameters and multiply-adds. The queries
    are on the full grid, and the keys and values on the coarser one. Each is turned into maps per
    tap on its own grid; the maps of keys and values are then upsampled (nearest) and cut to the
    size of the full grid. As in the authors' Swin, fc has a bias, and only the attention's path has
    an output projection. Prefix tokens have no position, so the convolution adds zero to them. With
    `prefix_queries` there is no convolution (`beta` and `convolution` are None), because no prefix
    token would read it.

    Args:
        dim, grid, heads, reduction, prefix, prefix_queries, dropout, device, dtype: as in
            `ReducedAttention2d`.
        head_dim: channels of a head, a divisor of dim; the default is dim / heads.
        conv_kernel_size: size of the convolution's kernel, odd.
        bias: whether the query, key and value projections and the convolution have a bias.
        learned_shifts: whether the shift kernels of the convolution are parameters. If not, fc has
            no bias.

    Attributes:
        q_proj, k_proj, v_proj, o_proj, reduce, norm: as in ReducedAttention2d.
        convolution: `ConvolutionPath`.
        alpha, beta: scalars that start at one half.

    Shapes:
        tokens [batch, prefix + rows · columns, dim], the grid row-major -> the same; with
        `prefix_queries` [batch, prefix, dim].

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """

    convolution: ConvolutionPath | None
    beta: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        grid: Sizes,
        heads: int = 8,
        reduction: int = 1,
        head_dim: int | None = None,
        conv_kernel_size: int = 3,
        prefix: int = 0,
        prefix_queries: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        learned_shifts: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            dim, grid, heads, reduction, head_dim, prefix, prefix_queries, dropout, bias, device,
            dtype,
        )  # fmt: skip
        if dim % self.head_dim:
            raise ValueError(f"head_dim: got {head_dim}, want a divisor of dim {dim}")
        self.alpha = nn.Parameter(torch.tensor(0.5, device=device, dtype=dtype))
        self.beta = self.convolution = None
        if not prefix_queries:
            self.beta = nn.Parameter(torch.tensor(0.5, device=device, dtype=dtype))
            # Through shifts that are not learned, fc's bias adds one number to all channels, which
            # the layer norm that follows removes.
            self.convolution = ConvolutionPath(
                3 * heads, self.head_dim, dim, conv_kernel_size, bias=bias,
                fc_bias=learned_shifts, learned=learned_shifts, device=device, dtype=dtype,
            )  # fmt: skip

    def forward(self, x: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Mix the tokens x, on the grid that the layer was made for or another one."""
        sizes = self._checked(x, grid)
        maps = self.project(x, sizes)
        y = self.alpha * self.attend(*maps)
        if self.convolution is None:
            return y
        z = self.convolve(self.convolution, sizes, *maps)
        return y + self.beta * F.pad(z, (0, 0, self.prefix, 0))

    def convolve(
        self,
        path: ConvolutionPath,
        grid: tuple[int, int],
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        """The output of the convolution path, [batch, rows · columns, dim].

        `query`, `key` and `value` are the tokens that `project` returns.
        """
        small = (-(-grid[0] // self.reduction), -(-grid[1] // self.reduction))
        q, k, v = (
            m[:, self.prefix :].transpose(1, 2).unflatten(2, size)
            for m, size in ((query, grid), (key, small), (value, small))
        )
        if self.reduction == 1:
            return path(q, k, v).flatten(2).transpose(1, 2)
        return path(q, coarse=(k, v), factor=self.reduction).flatten(2).transpose(1, 2)
