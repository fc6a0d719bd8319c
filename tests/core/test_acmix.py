from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import oracle
from translution.functional import shift_kernels
from translution.modules import ACmix2d, ConvolutionPath, LocalAttention2d
from translution.utils.measuring import peak_bytes


def stirred(module):
    """Every parameter random, so that none of them can be forgotten."""
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module


def project(x, conv, heads):
    y = torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], x)
    y = y if conv.bias is None else y + conv.bias[:, None, None]
    return y.unflatten(1, (heads, -1))


def acmix(m, x):
    """The whole operator by the paper's formulas: unlike the module it keeps q · p_i."""
    height, width = x.shape[2:]
    q, k, v = (project(x, conv, m.heads) for conv in (m.q_proj, m.k_proj, m.v_proj))
    w = m.position_proj.weight[:, :, 0, 0]
    places = torch.zeros(2, height, width, dtype=x.dtype)
    for i in range(height):
        for j in range(width):
            places[0, i, j] = -1 + 2 * j / (width - 1) if width > 1 else -1
            places[1, i, j] = -1 + 2 * i / (height - 1) if height > 1 else -1
    p = torch.einsum("dc,chw->dhw", w, places)
    rows, reach = [], (m.kernel_size - 1) // 2
    steps = [m.dilation * t for t in range(-reach, reach + 1)]
    for i in range(0, height, m.stride):
        for j in range(0, width, m.stride):
            near = [
                (oracle.reflect(i + a, height), oracle.reflect(j + b, width))
                for a in steps
                for b in steps
            ]
            s = [(q[..., i, j] * (k[..., a, b] + p[:, i, j] - p[:, a, b])).sum(-1) for a, b in near]
            weights = oracle.softmax(torch.stack(s, -1) / math.sqrt(m.head_dim))
            values = torch.stack([v[..., a, b] for a, b in near], -1)
            rows.append((weights[:, :, None] * values).sum(-1).flatten(1))
    out = len(range(0, height, m.stride)), len(range(0, width, m.stride))
    attention = torch.stack(rows, -1).unflatten(-1, out)
    path = m.convolution
    convolution = oracle.convolution_path(
        torch.cat([q, k, v], 1), path.fc.weight, path.fc.bias, path.shifts, path.bias,
        m.stride, path.dilation, path.grouped_order,
    )  # fmt: skip
    return m.alpha * attention + m.beta * convolution


@given(
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 3),
    kernel_size=st.sampled_from([1, 3, 5]),
    conv_kernel_size=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    bias=st.booleans(),
    published=st.booleans(),
)
def test_equals_the_oracle(
    size, heads, head_dim, kernel_size, conv_kernel_size, stride, dilation, bias, published
):
    m = ACmix2d(
        3, heads * head_dim, heads, kernel_size, conv_kernel_size, stride, dilation, bias,
        published=published,
    )  # fmt: skip
    stirred(m.double())
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    want, got = acmix(m, x), m(x)
    torch.testing.assert_close(got, want)
    leaves = [x, *m.parameters()]
    up = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, leaves, up, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(want, leaves, up, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("each", [1, 2, 9])
@pytest.mark.parametrize("fc_bias", [False, True])
@pytest.mark.parametrize("grouped_order", [False, True])
def test_convolution_path_in_one_step_and_in_two(each, fc_bias, grouped_order):
    path = ConvolutionPath(6, 2, 2 * each, 3, 2, 1, True, fc_bias, grouped_order=grouped_order)
    stirred(path.double())
    maps = [torch.randn(2, n * 2, 5, 4, dtype=torch.float64, requires_grad=True) for n in (1, 2, 3)]
    want = oracle.convolution_path(
        torch.cat([m.unflatten(1, (-1, 2)) for m in maps], 1),
        path.fc.weight, path.fc.bias, path.shifts, path.bias, 2, 1, grouped_order,
    )  # fmt: skip
    leaves = [*maps, *path.parameters()]
    up = torch.randn_like(want)
    grads = torch.autograd.grad(want, leaves, up)
    for path.at_once in (False, True):
        y = path(*maps)
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(torch.autograd.grad(y, leaves, up), grads)


def test_the_cheaper_way_is_taken():
    assert ConvolutionPath(12, 16, 64).at_once
    assert not ConvolutionPath(72, 32, 768).at_once


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_shifts_and_a_suitable_fc_are_a_convolution_of_the_projections(kernel, stride):
    """With α = 0, shift kernels and fc[t, slice] = the kernel's entry at tap t, each channel of a
    head is convolved over the slices: a plain convolution, whose weights the test chooses."""
    heads = 2
    m = ACmix2d(3, 4, heads, 3, kernel, stride).double()
    m.alpha.data.zero_()
    m.beta.data.fill_(1.0)
    wanted = torch.randn(3 * heads, kernel, kernel, dtype=torch.float64)
    m.convolution.fc.weight.data = wanted.flatten(1).T.contiguous()
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    slices = torch.cat(m.project(x), 1).unflatten(1, (3 * heads, 2)).transpose(1, 2).flatten(0, 1)
    y = F.conv2d(slices, wanted[None], stride=stride, padding=kernel // 2)
    y = y.unflatten(0, (2, 2)).squeeze(2)  # [batch, head_dim, ...], the same for each head
    torch.testing.assert_close(m(x), y.repeat(1, heads, 1, 1))


def test_the_shifts_start_as_shifts():
    m = ACmix2d(4, 8, 2)
    assert torch.equal(m.convolution.shifts, shift_kernels(3).expand(8, 9, 3, 3))
    assert m.alpha.item() == m.beta.item() == 0.5
    fixed = ACmix2d(4, 8, 2, learned_shifts=False)
    state = {k: v for k, v in m.state_dict().items() if k != "convolution.shifts"}
    fixed.load_state_dict(state)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(fixed(x), m(x))


def test_without_one_path_the_other_is_left():
    m = stirred(ACmix2d(4, 6, 3, 5, stride=2).double())
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    maps = m.project(x)
    m.beta.data.zero_()
    attention = LocalAttention2d(4, 6, 3, 5, stride=2).double()
    attention.load_state_dict(
        {k: v for k, v in m.state_dict().items() if k in attention.state_dict()}
    )
    torch.testing.assert_close(m(x), m.alpha * attention(x))
    m.beta.data.fill_(0.7)
    m.alpha.data.zero_()
    torch.testing.assert_close(m(x), 0.7 * m.convolve(*maps))


def test_with_equal_keys_attention_is_the_mean_of_the_neighbourhood():
    m = LocalAttention2d(2, 2, 1, 3).double()
    for conv in (m.k_proj, m.position_proj):
        torch.nn.init.zeros_(conv.weight)
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    mean = F.avg_pool2d(F.pad(m.v_proj(x), (1, 1, 1, 1), mode="reflect"), 3, 1)
    torch.testing.assert_close(m(x), mean)


def test_the_bias_of_the_positions_would_be_dead():
    """Why there is none: p_i - p_j does not know it."""
    assert ACmix2d(4, 4, 2).position_proj.bias is None


def test_every_parameter_has_a_gradient():
    m = stirred(ACmix2d(4, 6, 3))
    m(torch.randn(2, 4, 5, 5)).square().sum().backward()
    for name, p in m.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    m = stirred(ACmix2d(8, 8, 2, 5))
    x = torch.randn(2, 8, 9, 7)
    low = copy.deepcopy(m).to(dtype)
    exact = copy.deepcopy(low).double()
    want = exact(x.to(dtype).double())
    error = (low(x.to(dtype)).double() - want).norm() / want.norm()
    assert error < 4 * torch.finfo(dtype).eps
    with torch.autocast("cpu", torch.bfloat16):
        y = m(x)
    full = m(x)
    assert (y - full).norm() / full.norm() < 5 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("published", [False, True])
def test_compile_export_and_meta(published):
    torch._dynamo.reset()
    m = ACmix2d(4, 8, 2, 5, stride=2, published=published)
    x = torch.randn(2, 4, 9, 7)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), m(x))
    torch.testing.assert_close(torch.export.export(m.eval(), (x,)).module()(x), m(x))
    with torch.device("meta"):
        assert ACmix2d(4, 8, 2, stride=2)(x.to("meta")).shape == (2, 8, 5, 4)


def test_batch_of_none():
    m = ACmix2d(4, 8, 2)
    x = torch.randn(0, 4, 5, 5, requires_grad=True)
    m(x).sum().backward()
    assert x.grad.shape == x.shape


def test_memory_is_far_below_that_of_copies():
    """k² copies of k and v alone would take 49 times the map, each."""
    m = ACmix2d(32, 32, 4)
    x = torch.randn(4, 32, 28, 28, requires_grad=True)
    taken = peak_bytes(lambda: torch.autograd.grad(m(x).sum(), x), torch.device("cpu"))
    assert taken < 2 * 49 * x.numel() * x.element_size() / 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ACmix2d(4, 6, 4), "heads: got 4, want a divisor of out_channels 6"),
        (lambda: ACmix2d(4, 4, 2, 4), "kernel_size: got 4, want an odd int"),
        (lambda: ACmix2d(4, 4, 2, conv_kernel_size=2), "conv_kernel_size: got 2, want an odd int"),
        (lambda: ACmix2d(4, 4, 2, stride=0), "stride: got 0, want an int of at least 1"),
        (lambda: ACmix2d(4, 4, 2, dilation=1.5), "dilation: got 1.5"),
        (lambda: ACmix2d(4, 4, 2)(torch.zeros(1, 3, 5, 5)), r"x: got .* want floating point of"),
        (lambda: ACmix2d(4, 4, 2)(torch.zeros(4, 5, 5)), r"x: got .*\(batch, 4, height, width\)"),
        (lambda: ConvolutionPath(3, 4, 6), "out_channels: got 6, want a multiple of 4"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
