from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from translution.modules import SelfAttention
from translution.modules.reduced import ReducedACmix2d, ReducedAttention2d


def randomize(module):
    """Every parameter away from the values that it starts with."""
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module.double()


def linear(layer, x):
    y = x @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


def slices(module, x, grid):
    """Queries, keys and values, the latter patch by patch of the grid."""
    r, source = module.reduction, x
    if r > 1:
        rows = []
        for top, left in itertools.product(range(0, grid[0], r), range(0, grid[1], r)):
            total = module.reduce.bias.expand(len(x), -1)
            for i, j in itertools.product(range(r), range(r)):
                if top + i < grid[0] and left + j < grid[1]:
                    token = x[:, (top + i) * grid[1] + left + j]
                    total = total + token @ module.reduce.weight[:, :, i, j].T
            centred = total - total.mean(-1, keepdim=True)
            total = centred / (centred.square().mean(-1, keepdim=True) + module.norm.eps).sqrt()
            rows.append(total * module.norm.weight + module.norm.bias)
        source = torch.stack(rows, 1)
    return linear(module.q_proj, x), linear(module.k_proj, source), linear(module.v_proj, source)


def attention_oracle(module, x, grid):
    q, k, v = (m.unflatten(-1, (module.heads, -1)) for m in slices(module, x, grid))
    e = (torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(module.head_dim)).exp()
    y = torch.einsum("bhij,bjhd->bihd", e / e.sum(-1, keepdim=True), v)
    return linear(module.o_proj, y.flatten(2))


def convolution_oracle(module, x, grid):
    """Place by place: every place sees the key and value of its own patch, then tap by tap."""
    path, (height, width), n = module.convolution, grid, module.prefix
    q, k, v = (m[:, n:].unflatten(-1, (module.heads, -1)) for m in slices(module, x, grid))
    r = module.reduction
    columns = -(-width // r)
    at = [(i // r) * columns + j // r for i in range(height) for j in range(width)]
    s = torch.cat([q, k[:, at], v[:, at]], 2)
    maps = torch.einsum("ts,bpsd->bpdt", path.fc.weight, s) + path.fc.bias
    maps = maps.unflatten(1, grid)
    y = x.new_zeros(len(x), *grid, module.dim)
    size = path.kernel_size
    for row, column, i, j in itertools.product(
        range(height), range(width), range(size), range(size)
    ):
        a, b = row + i - size // 2, column + j - size // 2
        if 0 <= a < height and 0 <= b < width:
            kernel = path.shifts[:, :, i, j].unflatten(0, (module.head_dim, -1))
            z = torch.einsum("dnt,bdt->bnd", kernel, maps[:, a, b])
            y[:, row, column] += z.flatten(1)
    y = y + path.bias
    return torch.cat([x.new_zeros(len(x), n, module.dim), y.flatten(1, 2)], 1)


CASES = [
    # dim, heads, reduction, grid, prefix
    (6, 2, 1, (4, 3), 0),
    (6, 2, 1, (4, 3), 2),
    (4, 1, 2, (4, 6), 0),
    (6, 2, 2, (5, 3), 0),
    (10, 5, 2, (3, 5), 0),  # many heads: fc apart from the convolution
    (6, 3, 4, (5, 9), 0),
    (10, 5, 3, (2, 7), 0),
]


def compared(y, want, inputs):
    torch.testing.assert_close(y, want)
    weight = torch.randn_like(y)
    got, wanted = (torch.autograd.grad((out * weight).sum(), inputs) for out in (y, want))
    for g, h in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, h)


@pytest.mark.parametrize(("dim", "heads", "reduction", "grid", "prefix"), CASES)
def test_attention_is_the_oracles(dim, heads, reduction, grid, prefix):
    module = randomize(ReducedAttention2d(dim, grid, heads, reduction, prefix=prefix))
    x = torch.randn(2, prefix + math.prod(grid), dim, dtype=torch.float64, requires_grad=True)
    compared(module(x), attention_oracle(module, x, grid), [x, *module.parameters()])


@pytest.mark.parametrize(("dim", "heads", "reduction", "grid", "prefix"), CASES)
def test_acmix_is_the_oracles(dim, heads, reduction, grid, prefix):
    module = randomize(ReducedACmix2d(dim, (9, 9), heads, reduction, prefix=prefix))
    x = torch.randn(2, prefix + math.prod(grid), dim, dtype=torch.float64, requires_grad=True)
    y = module(x, grid)
    want = module.alpha * attention_oracle(module, x, grid)
    want = want + module.beta * convolution_oracle(module, x, grid)
    inputs = [x, *module.parameters()]
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(y.square().sum(), inputs))
    compared(module(x, grid), want, inputs)


def test_both_ways_of_the_convolution_are_tested():
    at_once = {
        ReducedACmix2d(c[0], c[3], c[1], c[2]).convolution.at_once for c in CASES if c[2] > 1
    }
    assert at_once == {False, True}


@pytest.mark.parametrize("reduction", [1, 3])
def test_alpha_and_beta(reduction):
    grid = (5, 4)
    module = randomize(ReducedACmix2d(6, grid, 2, reduction))
    x = torch.randn(2, 20, 6, dtype=torch.float64)
    with torch.no_grad():
        module.alpha.zero_(), module.beta.fill_(1)
        torch.testing.assert_close(module(x), convolution_oracle(module, x, grid))
        module.alpha.fill_(1), module.beta.zero_()
        parent = ReducedAttention2d(6, grid, 2, reduction).double()
        parent.load_state_dict(module.state_dict(), strict=False)
        torch.testing.assert_close(module(x), parent(x))


@pytest.mark.parametrize("prefix_queries", [False, True])
def test_without_reduction_it_is_self_attention(prefix_queries):
    common = {"heads": 2, "head_dim": 8, "prefix": 1, "prefix_queries": prefix_queries}
    ours = ReducedAttention2d(6, (3, 4), bias=False, **common).double()
    theirs = SelfAttention(6, (3, 4), **common).double()
    theirs.load_state_dict(ours.state_dict())
    for grid in ((3, 4), (2, 2)):
        x = torch.randn(2, 1 + math.prod(grid), 6, dtype=torch.float64)
        torch.testing.assert_close(ours(x, grid), theirs(x, grid))


def test_prefix_queries():
    """The prefix alone is answered, as before, and there is no convolution that no one reads."""
    common = {"heads": 2, "prefix": 2}
    whole = randomize(ReducedACmix2d(6, (3, 4), **common))
    lean = ReducedACmix2d(6, (3, 4), **common, prefix_queries=True).double()
    left_over = lean.load_state_dict(whole.state_dict(), strict=False)
    assert not left_over.missing_keys
    assert {k.split(".")[0] for k in left_over.unexpected_keys} == {"beta", "convolution"}
    x = torch.randn(2, 14, 6, dtype=torch.float64)
    torch.testing.assert_close(lean(x), whole(x)[:, :2])


@pytest.mark.parametrize("kind", [ReducedAttention2d, ReducedACmix2d])
def test_dropout(kind):
    module = kind(6, (3, 4), 2, dropout=0.5)
    x = torch.randn(2, 12, 6)
    assert not torch.equal(module(x), module(x))
    module.eval()
    torch.testing.assert_close(module(x), module(x))


def test_a_new_layer_sums_shifted_maps():
    """With the kernels it starts with and a suitable fc, β is a plain 3×3 convolution of v."""
    module = ReducedACmix2d(4, (5, 7), 1, bias=False).double()
    fc = module.convolution.fc
    nn.init.zeros_(fc.bias), nn.init.zeros_(fc.weight)
    nn.init.normal_(fc.weight[:, 2])
    x = torch.randn(2, 35, 4, dtype=torch.float64)
    with torch.no_grad():
        module.alpha.zero_(), module.beta.fill_(1)
        v = module.v_proj(x).transpose(1, 2).unflatten(2, (5, 7))
        kernel = fc.weight[:, 2].reshape(1, 1, 3, 3).repeat(4, 1, 1, 1)
        want = F.conv2d(v, kernel, padding=1, groups=4).flatten(2).transpose(1, 2)
        torch.testing.assert_close(module(x), want)


@pytest.mark.parametrize("heads", [2, 4])
def test_learned_shifts(heads):
    module = ReducedACmix2d(16, (5, 6), heads, 2, learned_shifts=False)
    twin = ReducedACmix2d(16, (5, 6), heads, 2)
    assert twin.load_state_dict(module.state_dict(), strict=False).missing_keys == [
        "convolution.shifts",
        "convolution.fc.bias",
    ]
    torch.nn.init.zeros_(twin.convolution.fc.bias)
    x = torch.randn(2, 30, 16)
    torch.testing.assert_close(module(x), twin(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [1, 8])
def test_half_precision_and_autocast(dtype, heads):
    module = ReducedACmix2d(16, (5, 6), heads, 2)
    x = torch.randn(2, 30, 16)
    y = module(x)
    near = {"rtol": 0.05, "atol": 0.05, "check_dtype": False}
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(module(x), y, **near)
    torch.testing.assert_close(module.to(dtype)(x.to(dtype)), y, **near)


@pytest.mark.parametrize("heads", [1, 8])
def test_compiles(heads):
    torch._dynamo.reset()
    module = ReducedACmix2d(16, (5, 6), heads, 2)
    x = torch.randn(2, 30, 16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, grid=(6, 5)), module(x, grid=(6, 5)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ReducedAttention2d(6, 4, 4), "heads: got 4, want a divisor of dim 6"),
        (lambda: ReducedAttention2d(6, 4, 2, 0), "reduction: got 0, want an int of at least 1"),
        (lambda: ReducedAttention2d(6, 4, 2, 2, prefix=1), "prefix: got 1, want 0 with a red"),
        (lambda: ReducedAttention2d(6, 4, 2, prefix_queries=True), "prefix_queries: got True"),
        (lambda: ReducedAttention2d(6, 4, 2, dropout=1.0), "dropout: got 1.0"),
        (lambda: ReducedAttention2d(6, (4, 4, 4), 2), r"grid: got \(4, 4, 4\), want two ints"),
        (lambda: ReducedAttention2d(6, (4, 0), 2), r"grid: got \(4, 0\)"),
        (lambda: ReducedACmix2d(6, 4, 2, head_dim=4), "head_dim: got 4, want a divisor of dim 6"),
        (lambda: ReducedACmix2d(6, 4, 2, conv_kernel_size=2), "conv_kernel_size: got 2"),
        (lambda: ReducedAttention2d(6, 4, 2)(torch.zeros(1, 15, 6)), r"x: got .*\(1, 15, 6\)"),
        (lambda: ReducedAttention2d(6, 4, 2)(torch.zeros(1, 6, 4, 4)), "x: got"),
        (
            lambda: ReducedACmix2d(6, 4, 2)(torch.zeros(1, 16, 6, dtype=torch.int64)),
            "x: got torch.int64",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("reduction", [1, 2])
def test_weights_are_those_that_attend_uses(reduction):
    m = ReducedAttention2d(4, (4, 3), 2, reduction).double()
    x = torch.randn(2, 12, 4, dtype=torch.float64)
    v = m.project(x, (4, 3))[2].unflatten(-1, (2, -1)).transpose(1, 2)
    y = (m.weights(x) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(m.o_proj(y), m(x))
