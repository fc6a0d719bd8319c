"""Convolution over the grid of tokens, the second operator that Translution generalises."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layouts import Sizes
from .checks import check_grid, check_int, check_tensor

__all__ = ["Convolution2d"]


class Convolution2d(nn.Module):
    """A k×k convolution over the grid, then an output projection: tokens in, tokens out.

    All tokens are on the grid; prefix tokens are not possible. Zero padding keeps the grid's size.

    Args:
        dim: channels of a token.
        grid: the default grid of `forward`, two sizes (or one int for both).
        kernel_size: odd.
        device, dtype: of the parameters, as in torch's own modules.

    Attributes:
        conv: nn.Conv2d(dim, dim, kernel_size).
        o_proj: nn.Linear(dim, dim).

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """

    def __init__(
        self,
        dim: int,
        grid: Sizes,
        kernel_size: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_int("dim", dim, 1)
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: got {kernel_size!r}, want an odd int of at least 1")
        self.dim = dim
        self.grid = check_grid(grid)
        self.conv = nn.Conv2d(
            dim, dim, kernel_size, padding=kernel_size // 2, bias=False, device=device, dtype=dtype
        )
        self.o_proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Mix the tokens x [batch, tokens, dim], row-major over `grid`; the shape stays the same.

        Raises:
            ValueError: x has another number of tokens or channels.
        """
        height, width = self.grid if grid is None else check_grid(grid)
        check_tensor("x", x, "(batch, tokens, dim)")
        if x.ndim != 3 or x.shape[1] != height * width or x.shape[2] != self.dim:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, want (batch, {height * width} tokens, "
                f"dim {self.dim}) for the grid {(height, width)}"
            )
        image = x.transpose(1, 2).unflatten(2, (height, width))
        return self.o_proj(self.conv(image).flatten(2).transpose(1, 2))
