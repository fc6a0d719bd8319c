"""Compare what a device computes with plain torch in float64, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...functional import neighborhood_attention, offset_mix, offset_scores
from ...layouts import Layout
from ...neighborhoods import Neighborhood
from .common import grid_text
from .gpu_rows import Row, Setting, dtype_name
from .measure import serving

__all__ = ["TOLERANCES", "NeighborhoodCheck", "OffsetCheck", "check", "checks"]

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""The largest relative error that passes for each dtype, measured in the Frobenius norm."""
Values = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class OffsetCheck:
    """A check of `offset_scores` and `offset_mix`: their values and all of their gradients.

    Attributes:
        layout: the offset class of each pair of tokens.
        batch: the number of samples.
        channels: the number of channels of a token.
        heads: the number of heads.
        dtype: the dtype of tokens and weights.
        biases: whether the projections have biases.
    """

    layout: Layout
    batch: int
    channels: int
    heads: int
    dtype: torch.dtype
    biases: bool = False

    @property
    def name(self) -> str:
        """The check in words, for a table."""
        layout = self.layout
        text = grid_text(layout.grid, layout.causal)
        text += f", prefix {layout.prefix}" * bool(layout.prefix)
        text += f", window {layout.window[0]}" if layout.window else ""
        text += ", biases" * self.biases
        return f"{text}, width {self.channels}, batch {self.batch}, {dtype_name(self.dtype)}"

    def inputs(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        """Draw tokens, tables, attention weights, and the gradients of scores and output."""
        draw = _Draw(device, seed)
        layout, channels, classes = self.layout, self.channels, self.layout.classes
        made = {
            "xq": draw(self.batch, layout.n_queries, channels).to(self.dtype),
            "xk": draw(self.batch, layout.n_keys, channels).to(self.dtype),
            "xv": draw(self.batch, layout.n_keys, channels).to(self.dtype),
        }
        for side in "qkv":
            made[f"w{side}"] = draw(classes, channels, channels).mul_(channels**-0.5).to(self.dtype)
            if self.biases:
                made[f"b{side}"] = draw(classes, channels).to(self.dtype)
        pairs = (self.batch, self.heads, layout.n_queries, layout.n_keys)
        there = (layout.index_on(device) >= 0).to(torch.float32)
        made["a"] = draw(*pairs).exp_().mul_(there)
        made["a"] /= made["a"].sum(-1, keepdim=True).clamp(min=1e-9)
        made["ds"] = draw(*pairs).mul_(there)  # the gradients of scores and output
        made["dy"] = draw(self.batch, layout.n_queries, channels).to(self.dtype)
        return made

    def values(self, given: dict[str, Tensor], backend: str) -> Values:
        """Yield the (name, tensor) pairs of all results and gradients.

        The scores are "s", the output of the mix is "y", and the gradient of "xq" is "dxq".

        Args:
            given: the tensors that `inputs` returned.
            backend: the backend that computes.
        """
        layout = self.layout
        leaves = {
            name: tensor.detach().requires_grad_()
            for name, tensor in given.items()
            if name not in ("ds", "dy")
        }
        xq, xk, xv, wq, wk, wv = (leaves[name] for name in ("xq", "xk", "xv", "wq", "wk", "wv"))
        s = offset_scores(
            xq, xk, wq, wk, layout, heads=self.heads, scale=(self.channels // self.heads) ** -0.5,
            bias_query=leaves.get("bq"), bias_key=leaves.get("bk"), backend=backend,
        )  # fmt: skip
        s = s.masked_fill(s.isneginf(), 0.0)
        yield "s", s.detach()
        yield from _gradients(s, leaves, ("xq", "xk", "wq", "wk", "bq", "bk"), given["ds"])
        y = offset_mix(
            leaves["a"], xv, wv, layout, bias_value=leaves.get("bv"), backend=backend
        )  # fmt: skip
        yield "y", y.detach()
        there = layout.index_on(y.device) >= 0
        for name, grad in _gradients(y, leaves, ("a", "xv", "wv", "bv"), given["dy"]):
            yield name, grad.masked_fill(~there, 0.0) if name == "da" else grad


@dataclass(frozen=True)
class NeighborhoodCheck:
    """A check of neighbourhood attention: its values and all of its gradients.

    Attributes:
        size: the height and width of the map of keys.
        batch: the number of samples.
        channels: the number of channels of a pixel, all heads together.
        heads: the number of heads.
        dtype: the dtype of queries, keys and values.
        kernel: the size of the neighbourhood.
        stride: the distance between queries in pixels.
    """

    size: tuple[int, int]
    batch: int
    channels: int
    heads: int
    dtype: torch.dtype
    kernel: int = 7
    stride: int = 1

    @property
    def name(self) -> str:
        """The check in words, for a table."""
        text = f"neighbourhood {self.kernel}×{self.kernel} of {grid_text(self.size)}"
        text += f", stride {self.stride}" * (self.stride > 1)
        return f"{text}, width {self.channels}, batch {self.batch}, {dtype_name(self.dtype)}"

    def inputs(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        """Draw queries, keys and values, and the gradient of the output."""
        draw = _Draw(device, seed)
        out = Neighborhood.of(self.size, self.kernel, self.stride).out
        sizes = {"q": out, "k": self.size, "v": self.size, "dy": out}
        lead, last = (self.batch, self.heads), self.channels // self.heads
        return {name: draw(*lead, *size, last).to(self.dtype) for name, size in sizes.items()}

    def values(self, given: dict[str, Tensor], backend: str) -> Values:
        """Yield the (name, tensor) pairs of the output "y" and the gradients "dq", "dk", "dv"."""
        leaves = {name: given[name].detach().requires_grad_() for name in "qkv"}
        y = neighborhood_attention(
            leaves["q"], leaves["k"], leaves["v"], self.kernel, self.stride, backend=backend
        )
        yield "y", y.detach()
        yield from _gradients(y, leaves, ("q", "k", "v"), given["dy"])


class _Draw:
    """Draws normal numbers; the same seed gives the same numbers."""

    def __init__(self, device: torch.device, seed: int):
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)


def _gradients(y: Tensor, leaves: dict[str, Tensor], names: tuple[str, ...], up: Tensor) -> Values:
    names = tuple(name for name in names if name in leaves)
    found = torch.autograd.grad(y, [leaves[name] for name in names], up.to(y.dtype))
    for name, grad in zip(names, found, strict=True):
        yield f"d{name}", grad


Check = OffsetCheck | NeighborhoodCheck


def check(
    case: Check, device: torch.device, backend: str = "auto", seed: int = 0
) -> dict[str, Any]:
    """Compare a case with plain torch, and a second run of it with the first.

    The reference computes the same rounded inputs on the same device in float64, or in float32 if
    float64 does not fit into memory.

    Args:
        case: the check.
        device: the device that computes.
        backend: the backend to check, or "auto".
        seed: the seed of the inputs.

    Returns:
        "backend" and "dtype", the names; "errors", the relative error of each tensor; "largest",
        the largest of them; "tolerance", the error that is allowed; "exact", the dtype of the
        reference; "equal_bits", whether the second run gave the same bits; "passed".
    """
    given = case.inputs(device, seed)
    mine = dict(case.values(given, backend))
    equal = all(torch.equal(mine[name], again) for name, again in case.values(given, backend))
    errors, exact = {}, torch.float64
    try:
        errors = _errors(case, given, mine, exact)
    except torch.OutOfMemoryError:
        exact = torch.float32
    if not errors:
        torch.cuda.empty_cache()
        errors = _errors(case, given, mine, exact)
    largest = math.nan if any(map(math.isnan, errors.values())) else max(errors.values())
    tolerance = TOLERANCES[case.dtype]
    return {
        "backend": serving(backend, device, case.dtype),
        "dtype": dtype_name(case.dtype),
        "errors": errors,
        "largest": largest,
        "tolerance": tolerance,
        "exact": dtype_name(exact),
        "equal_bits": equal,
        "passed": equal and largest < tolerance,  # NaN is not smaller
    }


def _errors(
    case: Check, given: dict[str, Tensor], mine: dict[str, Tensor], exact: torch.dtype
) -> dict[str, float]:
    wide = {name: tensor.to(exact) for name, tensor in given.items()}
    found = {}
    for name, want in case.values(wide, "torch"):
        error = (mine[name].to(exact) - want).norm() / want.norm().clamp(min=1e-30)
        found[name] = float(error)
    return found


# -- the rows of this part -------------------------------------------------------------------------


def checks(dry: bool) -> list[Row]:
    """Return the rows of the part "check"; `dry` takes tiny sizes."""
    kinds = (torch.bfloat16, torch.float32, torch.float16)
    if dry:
        cases: list[tuple[int, Check]] = [
            (0, OffsetCheck(Layout((2, 2), prefix=1), 2, 16, 2, kinds[1], biases=True)),
            (1, OffsetCheck(Layout((3,), causal=True), 2, 16, 2, kinds[0])),
            (1, NeighborhoodCheck((4, 3), 2, 16, 2, kinds[1], 3)),
        ]
    else:
        grid = Layout((14, 14), prefix=1)
        cases = []
        for rank, kind in enumerate(kinds):
            cases += [
                (rank, OffsetCheck(grid, 64, 192, 3, kind)),
                (rank, OffsetCheck(Layout((14, 14), window=(3, 3)), 64, 384, 6, kind)),
                (max(rank, 1), OffsetCheck(Layout((1024,), causal=True), 2, 192, 3, kind)),
                (max(rank, 1), OffsetCheck(Layout((7, 7)), 64, 192, 3, kind, biases=True)),
                (max(rank, 1), OffsetCheck(grid, 8, 768, 12, kind)),
                (rank, NeighborhoodCheck((56, 56), 16, 64, 4, kind)),
                (max(rank, 1), NeighborhoodCheck((14, 14), 16, 256, 4, kind)),
            ]
    return [Row("check", case.name, _measuring(case), rank, 15) for rank, case in cases]


def _measuring(case: Check) -> Callable[[Setting], dict[str, Any]]:
    return lambda setting: check(case, setting.device, setting.backend)
