from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from translution.modules.window import WindowACmix2d, WindowAttention2d


def randomize(module):
    """Every parameter away from the values that it starts with."""
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module.double()


def linear(conv, x):
    """A 1×1 convolution, written as the matrix that it is."""
    y = torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], x)
    return y if conv.bias is None else y + conv.bias[:, None, None]


def attention_oracle(module, x):
    """Pair by pair: who is in whose window, its offset's number, softmax over those seen."""
    height, width = x.shape[2:]
    w, places = module.window_size, list(itertools.product(range(height), range(width)))

    def window(at):
        """Which window a place is in; the borders lie at the shift and every w from there."""
        return tuple(
            0 if n <= w else (p - module.shift) // w
            for p, n in zip(at, (height, width), strict=True)
        )

    q, k, v = (
        linear(p, x).flatten(2).unflatten(1, (module.heads, -1))
        for p in (module.q_proj, module.k_proj, module.v_proj)
    )
    out = []
    for i, a in enumerate(places):
        seen = [j for j, b in enumerate(places) if window(a) == window(b)]
        scores = []
        for j in seen:
            down, right = a[0] - places[j][0], a[1] - places[j][1]
            row = (down + w - 1) * (2 * w - 1) + right + w - 1
            s = (q[..., i] * k[..., j]).sum(-1) / math.sqrt(module.head_dim)
            scores.append(s + module.position_bias[row])
        e = torch.stack(scores, -1).exp()
        out.append(torch.einsum("bhj,bhdj->bhd", e / e.sum(-1, keepdim=True), v[..., seen]))
    y = torch.stack(out, -1).flatten(1, 2).unflatten(2, (height, width))
    return linear(module.o_proj, y)


def convolution_oracle(module, x, shift=(0, 0)):
    """Tap by tap: fc's maps at each place, then the grouped kernels. Place p of the result reads
    its neighbours as they stand on the map rolled back by `shift`."""
    height, width = x.shape[2:]
    path, d = module.convolution, module.head_dim
    slices = torch.cat(
        [
            linear(p, x).unflatten(1, (module.heads, d))
            for p in (module.q_proj, module.k_proj, module.v_proj)
        ],
        1,
    )
    maps = torch.einsum("ts,bsdhw->bdthw", path.fc.weight, slices)
    maps = maps + path.fc.bias[:, None, None]
    y = x.new_zeros(x.shape)
    k = path.kernel_size
    for r, c, i, j in itertools.product(range(height), range(width), range(k), range(k)):
        rolled = (r - shift[0]) % height + i - k // 2, (c - shift[1]) % width + j - k // 2
        if 0 <= rolled[0] < height and 0 <= rolled[1] < width:
            source = maps[..., (rolled[0] + shift[0]) % height, (rolled[1] + shift[1]) % width]
            # output o = channel · heads + n of the grouped convolution reads channel's maps
            kernel = path.shifts[:, :, i, j].unflatten(0, (d, module.heads))
            z = torch.einsum("dnt,bdt->bdn", kernel, source)
            z = z if path.grouped_order else z.transpose(1, 2)
            y[:, :, r, c] += z.flatten(1)
    return y if path.bias is None else y + path.bias[:, None, None]


CASES = [
    # window, shift, height, width
    (3, 0, 6, 9),
    (3, 1, 6, 9),
    (4, 2, 8, 8),
    (4, 2, 9, 6),
    (4, 3, 5, 11),
    (3, 0, 7, 5),
    (3, 2, 7, 3),  # one axis no longer than the window
    (4, 2, 2, 10),
    (5, 2, 3, 5),
    (5, 2, 1, 1),
    (1, 0, 2, 3),
]


@pytest.mark.parametrize(("window", "shift", "height", "width"), CASES)
def test_attention_is_the_oracles(window, shift, height, width):
    module = randomize(WindowAttention2d(6, 2, window, shift))
    x = torch.randn(2, 6, height, width, dtype=torch.float64, requires_grad=True)
    y, want = module(x), attention_oracle(module, x)
    torch.testing.assert_close(y, want)
    with torch.no_grad():  # torch has another kernel where no gradient is wanted
        torch.testing.assert_close(module(x), want)
    inputs = [x, *module.parameters()]
    weight = torch.randn_like(y)
    got, wanted = (torch.autograd.grad((out * weight).sum(), inputs) for out in (y, want))
    for name, g, h in zip(
        ["x", *(n for n, _ in module.named_parameters())], got, wanted, strict=True
    ):
        torch.testing.assert_close(g, h, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(("window", "shift", "height", "width"), CASES[1:8:2])
def test_acmix_is_the_oracles(window, shift, height, width, published):
    module = randomize(WindowACmix2d(6, 2, window, shift, published=published))
    x = torch.randn(2, 6, height, width, dtype=torch.float64, requires_grad=True)
    rolled = tuple(shift if published and n > window else 0 for n in (height, width))
    y = module(x)
    want = module.alpha * attention_oracle(module, x)
    want = want + module.beta * convolution_oracle(module, x, rolled)
    torch.testing.assert_close(y, want)
    inputs = [x, *module.parameters()]
    weight = torch.randn_like(y)
    got, wanted = (torch.autograd.grad((out * weight).sum(), inputs) for out in (y, want))
    for g, h in zip(got, wanted, strict=True):
        assert g.abs().max() > 0
        torch.testing.assert_close(g, h)


@pytest.mark.parametrize("published", [False, True])
def test_alpha_and_beta(published):
    module = randomize(WindowACmix2d(6, 2, 4, 2, published=published))
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        module.alpha.zero_(), module.beta.fill_(1)
        rolled = (2, 2) if published else (0, 0)
        torch.testing.assert_close(module(x), convolution_oracle(module, x, rolled))
        module.alpha.fill_(1), module.beta.zero_()
        parent = WindowAttention2d(6, 2, 4, 2).double()
        parent.load_state_dict(module.state_dict(), strict=False)
        torch.testing.assert_close(module(x), parent(x))


def test_opposite_borders_touch_only_as_published():
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    changed = x.clone()
    changed[0, :, 0, 3] += 1
    for published in (False, True):
        module = randomize(WindowACmix2d(4, 2, 4, 2, published=published))
        with torch.no_grad():
            module.alpha.zero_()
            moved = (module(changed) - module(x)).abs().amax((0, 1)) > 1e-9
        assert moved[0, 3]
        assert moved[1, 3]
        assert bool(moved[7, 3]) == published


def test_a_new_layer_sums_shifted_maps():
    """With the kernels it starts with and a suitable fc, β is a plain 3×3 convolution."""
    module = WindowACmix2d(6, 2, bias=False).double()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    torch.nn.init.normal_(module.convolution.fc.weight)
    torch.nn.init.zeros_(module.convolution.fc.bias)
    weight = torch.zeros(6, 6, 3, 3, dtype=torch.float64)
    for i, p in enumerate((module.q_proj, module.k_proj, module.v_proj)):
        part = module.convolution.fc.weight[:, 2 * i : 2 * i + 2]
        kernel = torch.einsum("ts,sdc->dct", part, p.weight[:, :, 0, 0].unflatten(0, (2, 3)))
        weight += kernel.unflatten(2, (3, 3)).repeat(2, 1, 1, 1)
    with torch.no_grad():
        module.alpha.zero_(), module.beta.fill_(1)
        torch.testing.assert_close(module(x), F.conv2d(x, weight, padding=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    module = WindowACmix2d(8, 2, 4, 2)
    x = torch.randn(2, 8, 9, 6)
    y = module(x)
    near = {"rtol": 0.05, "atol": 0.05, "check_dtype": False}
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(module(x), y, **near)
    torch.testing.assert_close(module.to(dtype)(x.to(dtype)), y, **near)


def test_compiles():
    torch._dynamo.reset()
    module = WindowACmix2d(8, 2, 4, 2)
    x = torch.randn(2, 8, 9, 6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


def test_learned_shifts():
    module = WindowACmix2d(8, 2, 4, 2, learned_shifts=False)
    twin = WindowACmix2d(8, 2, 4, 2)
    assert twin.load_state_dict(module.state_dict(), strict=False).missing_keys == [
        "convolution.shifts",
        "convolution.fc.bias",
    ]
    torch.nn.init.zeros_(twin.convolution.fc.bias)
    x = torch.randn(2, 8, 9, 6)
    torch.testing.assert_close(module(x), twin(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WindowAttention2d(6, 4), "heads: got 4, want a divisor of dim 6"),
        (lambda: WindowAttention2d(0, 1), "dim: got 0, want an int of at least 1"),
        (lambda: WindowAttention2d(6, 2, 7.0), "window_size: got 7.0"),
        (lambda: WindowAttention2d(6, 2, 4, 4), "shift: got 4, want less than window_size 4"),
        (lambda: WindowAttention2d(6, 2, 4, -1), "shift: got -1"),
        (lambda: WindowACmix2d(6, 2, conv_kernel_size=2), "conv_kernel_size: got 2"),
        (lambda: WindowAttention2d(6, 2)(torch.zeros(1, 5, 3, 3)), r"x: got .*\(1, 5, 3, 3\)"),
        (
            lambda: WindowAttention2d(6, 2)(torch.zeros(1, 6, 3, 3, dtype=torch.int64)),
            "x: got torch.int64",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
