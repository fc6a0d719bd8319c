"""A convolution taken apart into 1×1 convolutions, shifts and sums, against torch's own."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from translution.functional import convolution_by_shifts, shift_and_sum, shift_kernels


def twos(least, most):
    return st.tuples(st.integers(least, most), st.integers(least, most))


@st.composite
def cases(draw):
    """(size, kernel, stride, padding, dilation) with at least one output."""
    size, kernel = draw(twos(1, 9)), draw(twos(1, 5))
    stride, padding, dilation = draw(twos(1, 4)), draw(twos(0, 6)), draw(twos(1, 3))
    for n, k, p, d in zip(size, kernel, padding, dilation, strict=True):
        assume(n + 2 * p >= d * (k - 1) + 1)
    return size, kernel, stride, padding, dilation


def graded(call, *leaves):
    leaves = [x.clone().requires_grad_() for x in leaves]
    y = call(*leaves)
    if not y.requires_grad:  # all of it is padding
        return [y, *map(torch.zeros_like, leaves)]
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return [y, *torch.autograd.grad(y, leaves, up, materialize_grads=True)]


def agree(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)


@given(cases(), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.integers(0, 2))
def test_convolution_by_shifts_is_conv2d(case, groups, inner, outer, batch):
    size, kernel, stride, padding, dilation = case
    x = torch.randn(batch, groups * inner, *size, dtype=torch.float64)
    weight = torch.randn(groups * outer, inner, *kernel, dtype=torch.float64)
    bias = torch.randn(groups * outer, dtype=torch.float64)
    along = (stride, padding, dilation, groups)
    agree(
        graded(lambda x, w, b: convolution_by_shifts(x, w, b, *along), x, weight, bias),
        graded(lambda x, w, b: F.conv2d(x, w, b, *along), x, weight, bias),
    )


@given(cases(), st.integers(1, 3))
def test_shift_and_sum_is_a_grouped_convolution_with_shift_kernels(case, channels):
    size, kernel, stride, padding, dilation = case
    taps = kernel[0] * kernel[1]
    maps = torch.randn(2, taps, channels, *size, dtype=torch.float64)
    weight = shift_kernels(kernel, maps).repeat(channels, 1, 1, 1)

    def grouped(maps):
        beside = maps.transpose(1, 2).flatten(1, 2)
        return F.conv2d(beside, weight, None, stride, padding, dilation, channels)

    def shifted(maps):
        return shift_and_sum(maps, kernel, stride, padding, dilation)

    agree(graded(shifted, maps), graded(grouped, maps))


def test_shift_and_sum_place_by_place():
    maps = torch.randn(2, 6, 3, 5, 7, dtype=torch.float64)
    y = shift_and_sum(maps, (3, 2), (2, 1), (1, 2), (1, 3))
    assert y.shape == (2, 3, 3, 8)
    for i, j in itertools.product(range(3), range(8)):
        total = torch.zeros(2, 3, dtype=torch.float64)
        for tap, (a, b) in enumerate(itertools.product(range(3), range(2))):
            row, column = 2 * i + a - 1, j + 3 * b - 2
            if 0 <= row < 5 and 0 <= column < 7:
                total += maps[:, tap, :, row, column]
        torch.testing.assert_close(y[:, :, i, j], total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_stays_and_padding_keeps_the_size(dtype):
    maps = torch.randn(2, 15, 3, 4, 6).to(dtype)
    y = shift_and_sum(maps, (3, 5), dilation=2)
    assert y.dtype == dtype
    assert y.shape == (2, 3, 4, 6)
    # 15 terms, each addition rounded
    want = shift_and_sum(maps.double(), (3, 5), dilation=2)
    bound = 15 * torch.finfo(dtype).eps * shift_and_sum(maps.double().abs(), (3, 5), dilation=2)
    assert ((y.double() - want).abs() <= bound).all()


def test_strided_maps_and_compile():
    torch._dynamo.reset()
    maps = torch.randn(2, 5, 6, 3, 18)[..., ::2].permute(0, 4, 2, 3, 1)
    assert maps.shape == (2, 9, 6, 3, 5)
    want = shift_and_sum(maps.contiguous(), 3, 2)
    torch.testing.assert_close(shift_and_sum(maps, 3, 2), want)
    compiled = torch.compile(shift_and_sum, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(maps, 3, 2), want)


def test_shift_kernels():
    kernels = shift_kernels((2, 3))
    assert kernels.shape == (6, 2, 3)
    for tap, (row, column) in enumerate(itertools.product(range(2), range(3))):
        assert kernels[tap, row, column] == 1
        assert kernels[tap].sum() == 1
    assert shift_kernels(3, torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("size", "arguments", "message"),
    [
        ((1, 8, 2, 4, 4), (3,), r"maps: got shape .* want \(batch, taps 9, channels"),
        ((9, 2, 4, 4), (3,), "maps: got shape"),
        ((1, 4, 2, 4, 4), (2,), r"kernel_size: got \(2, 2\), want odd sizes"),
        ((1, 9, 2, 4, 4), (0,), "kernel_size: got 0, want an int of at least 1"),
        ((1, 9, 2, 4, 4), (3, 0), "stride: got 0, want an int of at least 1"),
        ((1, 9, 2, 4, 4), (3, 1, -1), "padding: got -1, want an int of at least 0"),
        ((1, 9, 2, 4, 4), (3, 1, 0.5), "padding: got 0.5"),
        ((1, 9, 2, 4, 4), (3, 1, 1, (1, 2, 3)), r"dilation: got \(1, 2, 3\)"),
        ((1, 9, 2, 2, 4), (3, 1, 0), r"maps: got size \(2, 4\), too small"),
    ],
)
def test_shift_and_sums_errors(size, arguments, message):
    with pytest.raises(ValueError, match=message):
        shift_and_sum(torch.zeros(size), *arguments)


@pytest.mark.parametrize(
    ("x", "weight", "groups", "message"),
    [
        ((1, 4, 4, 4), (3, 2, 3, 3), 2, "groups: got 2, want a divisor of the 3 out channels"),
        ((1, 4, 4, 4), (3, 2, 3, 3), 0, "groups: got 0"),
        ((1, 3, 4, 4), (3, 2, 3, 3), 1, r"x: got shape \(1, 3, 4, 4\), want \(batch, 2"),
        ((2, 4, 4), (3, 2, 3, 3), 1, r"x: got shape \(2, 4, 4\)"),
        ((1, 2, 4, 4), (3, 2, 3), 1, r"weight: got shape \(3, 2, 3\)"),
        ((1, 2, 2, 4), (3, 2, 3, 3), 1, r"maps: got size \(2, 4\), too small"),
    ],
)
def test_convolution_by_shifts_errors(x, weight, groups, message):
    with pytest.raises(ValueError, match=message):
        convolution_by_shifts(torch.zeros(x), torch.zeros(weight), groups=groups)


def test_shift_kernels_errors():
    with pytest.raises(ValueError, match="kernel_size: got 0, want an int of at least 1"):
        shift_kernels(0)


def test_the_picture_of_the_docs(tmp_path):
    """Drawn from the code: both ways agree, and a PNG is written."""
    path = Path(__file__).parents[2] / "docs" / "decomposition.py"
    spec = importlib.util.spec_from_file_location("decomposition", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.draw(tmp_path / "picture.png") < 1e-6
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
