"""Neighbourhoods, attention over them and mixing by given weights, against a slow twin."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from translution.functional import neighborhood_attention, neighborhood_mix
from translution.measuring import peak_bytes
from translution.neighborhoods import Neighborhood, reflect

HALVES = [torch.bfloat16, torch.float16]


def twos(values):
    return st.tuples(values, values)


@st.composite
def areas(draw):
    return Neighborhood(
        draw(twos(st.integers(1, 12))),
        draw(twos(st.sampled_from([1, 3, 5, 7]))),
        draw(twos(st.integers(1, 3))),
        draw(twos(st.integers(1, 3))),
    )


# -- geometry -------------------------------------------------------------------------------------


@given(st.data(), areas())
def test_index_is_what_torch_pads_and_unfolds(data, area):
    down, right = (d * (k - 1) // 2 for d, k in zip(area.dilation, area.kernel, strict=True))
    # torch reflects once only
    size = tuple(data.draw(st.integers(r + 1, r + 6)) for r in (down, right))
    area = Neighborhood(size, area.kernel, area.stride, area.dilation)
    x = torch.arange(float(size[0] * size[1])).view(1, 1, *size)
    wide = F.pad(x, (right, right, down, down), "reflect")
    patches = F.unfold(wide, area.kernel, area.dilation, 0, area.stride)
    assert torch.equal(area.index.T.float(), patches[0])


@given(areas())
def test_index_place_by_place(area):
    """Maps of any size, also those that torch cannot reflect."""
    index = area.index.view(*area.out, *area.kernel)
    assert area.out == tuple(-(-n // s) for n, s in zip(area.size, area.stride, strict=True))

    def walked(place, size):
        """Step by step along the line, turning round at its ends."""
        at, way = 0, 1
        for _ in range(abs(place)):  # the line is its own mirror image
            if size == 1:
                return 0
            way = 1 if at == 0 else -1 if at == size - 1 else way
            at += way
        return at

    for i, j in itertools.product(*map(range, area.out)):
        for a, b in itertools.product(*map(range, area.kernel)):
            row = i * area.stride[0] + (a - area.kernel[0] // 2) * area.dilation[0]
            column = j * area.stride[1] + (b - area.kernel[1] // 2) * area.dilation[1]
            want = walked(row, area.size[0]) * area.size[1] + walked(column, area.size[1])
            assert index[i, j, a, b] == want


def test_reflect():
    line = [reflect(place, 4) for place in range(-7, 11)]
    assert line == [1, 0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2]
    assert {reflect(place, 1) for place in range(-3, 4)} == {0}


@given(areas())
def test_tiles_hold_each_query_once_and_each_pair_as_often_as_it_is(area):
    tiles = area.tiles(torch.device("cpu"), torch.float64)
    queries = tiles.query_index.view(tiles.count, tiles.queries)
    keys = tiles.key_index.view(tiles.count, tiles.keys)
    times = torch.zeros(area.out[0] * area.out[1], area.size[0] * area.size[1])
    used = torch.ones(queries.numel()) if tiles.used is None else tiles.used.flatten()
    for (tile, row), at in zip(
        itertools.product(range(tiles.count), range(tiles.queries)), used.tolist(), strict=True
    ):
        if at:
            times[queries[tile, row]].index_add_(
                0, keys[tile], tiles.log_times[tile, row].exp().float()
            )
    want = torch.zeros_like(times)
    want.scatter_add_(1, area.index, torch.ones_like(area.index, dtype=torch.float32))
    torch.testing.assert_close(times, want)
    slots = tiles.query_slot
    assert torch.equal(tiles.query_index[slots], torch.arange(len(slots)))


# -- the operators --------------------------------------------------------------------------------


def attention(q, k, v, area, scale=None):
    """In float64 (or what comes), with a copy of every neighbourhood."""
    index = area.index
    k, v = (x.flatten(2, 3)[:, :, index] for x in (k, v))  # [batch, heads, queries, taps, channels]
    flat = q.flatten(2, 3)
    s = (flat[..., None, :] * k).sum(-1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (s.softmax(-1)[..., None] * v).sum(-2).unflatten(2, area.out)


def mix(weights, value, area):
    """In float64 (or what comes), with a copy of every neighbourhood."""
    groups = weights.shape[1]
    seen = value.flatten(2)[:, :, area.index].transpose(2, 3)  # [batch, channels, taps, queries]
    w = weights.flatten(3)[:, torch.arange(value.shape[1]) % groups]
    return (w * seen).sum(2).unflatten(2, area.out)


def library(operator, area):
    return lambda *x, **more: operator(
        *x, area.kernel, stride=area.stride, dilation=area.dilation, **more
    )


def attention_inputs(area, batch=2, heads=2, dim=3, channels=4, dtype=torch.float64):
    return [
        torch.randn(batch, heads, *size, c, dtype=torch.float64).to(dtype)
        for size, c in ((area.out, dim), (area.size, dim), (area.size, channels))
    ]


def mix_inputs(area, batch=2, groups=2, each=2, dtype=torch.float64):
    return [
        torch.randn(batch, groups, area.taps, *area.out, dtype=torch.float64).to(dtype),
        torch.randn(batch, groups * each, *area.size, dtype=torch.float64).to(dtype),
    ]


def run(call, leaves):
    """The output and every gradient, from one random upstream gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    y = call(*leaves)
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y, *torch.autograd.grad(y, leaves, up.to(y.dtype))]


def agree(got, want, rtol=1e-10):
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        scale = float(w.detach().abs().max()) if w.numel() else 0.0
        torch.testing.assert_close(g.to(w.dtype), w, rtol=0, atol=rtol * max(scale, 1))


@given(
    areas(), st.integers(0, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4),
    st.sampled_from([None, 0.0, 1.5]),
)  # fmt: skip
def test_attention_is_the_oracle(area, batch, heads, dim, channels, scale):
    leaves = attention_inputs(area, batch, heads, dim, channels)
    fast = library(neighborhood_attention, area)
    agree(
        run(lambda *x: fast(*x, scale=scale), leaves),
        run(lambda *x: attention(*x, area, scale), leaves),
    )


@given(areas(), st.integers(0, 2), st.integers(1, 3), st.integers(1, 3))
def test_mix_is_the_oracle(area, batch, groups, each):
    leaves = mix_inputs(area, batch, groups, each)
    agree(run(library(neighborhood_mix, area), leaves), run(lambda *x: mix(*x, area), leaves))


KINDS = {
    "attention": (neighborhood_attention, attention, attention_inputs),
    "mix": (neighborhood_mix, mix, mix_inputs),
}


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("kind", KINDS)
@given(area=areas())
def test_low_precision_is_no_worse_than_eager(kind, dtype, area):
    operator, slow, make = KINDS[kind]
    leaves = make(area, dtype=dtype)
    want = run(lambda *x: slow(*x, area), [x.double() for x in leaves])
    eager = run(lambda *x: slow(*x, area), leaves)
    got = run(library(operator, area), leaves)
    for g, e, w in zip(got, eager, want, strict=True):
        assert g.dtype == dtype
        off, allowed = ((x.double() - w).abs().max() for x in (g, e))
        # The result is rounded, and so is the output that the backward pass starts from. In float32
        # so are the terms of softmax's derivative, whose difference may be nothing (with one tap
        # eager has it exactly); half precision computes them in float32.
        roundings = 2 if dtype in HALVES else 20
        bound = roundings * torch.finfo(dtype).eps * w.abs().max().clamp(min=1)
        assert off <= allowed + bound, (off, allowed, bound)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    operator, _, make = KINDS[kind]
    area = Neighborhood((5, 4), (3, 3))
    leaves = make(area, dtype=torch.float32)
    want = library(operator, area)(*leaves)
    with torch.autocast("cpu", torch.bfloat16):
        got = library(operator, area)(*leaves)
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_inputs(kind):
    operator, _, make = KINDS[kind]
    area = Neighborhood((6, 5), (5, 3), (2, 1), (1, 2))
    leaves = make(area)
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in leaves]
    spread = [x.repeat_interleave(2, 0)[::2] for x in leaves]
    want = run(library(operator, area), leaves)
    for other in (turned, spread):
        live = [x.detach().requires_grad_() for x in other]
        y = library(operator, area)(*live)
        up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        strided = up.transpose(-1, -2).contiguous().transpose(-1, -2)
        agree([y, *torch.autograd.grad(y, live, strided)], want)
    # one number for all
    live = [x.detach().requires_grad_() for x in leaves]
    y = library(operator, area)(*live)
    ones = torch.ones_like(y)
    agree(torch.autograd.grad(y.sum(), live, retain_graph=True), torch.autograd.grad(y, live, ones))


@pytest.mark.parametrize("size", [(20, 17), (3, 2)])
def test_small_chunks_change_nothing(size, monkeypatch):
    area = Neighborhood(size, (5, 7), (1, 2), (2, 1))
    leaves = attention_inputs(area, batch=3, heads=2)
    want = run(library(neighborhood_attention, area), leaves)
    monkeypatch.setattr("translution.functional.neighborhood.NUMBERS", {"cpu": 1, "cuda": 1})
    agree(run(library(neighborhood_attention, area), leaves), want, 1e-12)


def test_large_scores_do_not_overflow():
    area = Neighborhood((9, 9), (5, 5))
    leaves = attention_inputs(area)
    leaves[0] = leaves[0] * 1e4
    agree(
        run(library(neighborhood_attention, area), leaves),
        run(lambda *x: attention(*x, area), leaves),
        1e-7,  # scores of 1e4 have lost that many digits
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_and_opcheck(kind):
    operator, _, make = KINDS[kind]
    area = Neighborhood((3, 4), (3, 5), (2, 1), (1, 2))
    leaves = [x.requires_grad_() for x in make(area, batch=1, dtype=torch.float64)]
    assert torch.autograd.gradcheck(library(operator, area), leaves)
    raw = getattr(torch.ops.translution, operator.__name__).default
    more = [list(area.kernel), list(area.stride), list(area.dilation)]
    torch.library.opcheck(raw, (*leaves, *more, *([0.7] if kind == "attention" else [])))


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind):
    torch._dynamo.reset()
    operator, _, make = KINDS[kind]
    for size in ((6, 5), (4, 7)):
        area = Neighborhood(size, (3, 3), (2, 2))
        leaves = make(area)
        call = library(operator, area)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        agree(run(compiled, leaves), run(call, leaves), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_meta(kind):
    operator, _, make = KINDS[kind]
    area = Neighborhood((5, 4), (3, 3), (2, 2))
    leaves = make(area)
    y = library(operator, area)(*leaves)
    assert library(operator, area)(*(x.to("meta") for x in leaves)).shape == y.shape


def test_no_copy_of_the_neighbourhoods():
    area = Neighborhood((28, 28), (7, 7))
    cpu = torch.device("cpu")

    def peak(kind):
        operator, _, make = KINDS[kind]
        shape = {"heads": 4, "dim": 32, "channels": 32} if kind == "attention" else {"each": 64}
        leaves = [x.requires_grad_() for x in make(area, dtype=torch.float32, **shape)]

        def step():
            library(operator, area)(*leaves).sum().backward()
            for x in leaves:
                x.grad = None

        step()  # tables of the geometry are made once
        return peak_bytes(step, cpu), sum(x.numel() for x in leaves[1:]) * 4

    found, keys_and_values = peak("attention")
    assert found < 49 * keys_and_values / 4
    found, values = peak("mix")
    assert found < 49 * values / 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": (2, 4, 4, 3)}, r"query: got torch.float32 of shape \(2, 4, 4, 3\), want"),
        ({"query": (1, 2, 3, 4, 3)}, r"query: got shape \(1, 2, 3, 4, 3\), want \(1, 2, 4, 4, 3\)"),
        ({"query": (1, 2, 4, 4, 5)}, r"query: got shape \(1, 2, 4, 4, 5\), want \(1, 2, 4, 4, 3\)"),
        ({"key": torch.zeros(1, 2, 4, 4, 3).double()}, "key: got torch.float64"),
        ({"key": torch.zeros(1, 2, 4, 4, 3, dtype=torch.int64)}, "key: got torch.int64"),
        ({"value": (1, 2, 4, 5, 3)}, r"value: got shape \(1, 2, 4, 5, 3\), want \(1, 2, 4, 4\)"),
        ({"key": (1, 2, 0, 4, 3)}, "key: got a map of 0×4, want at least 1×1"),
        ({"kernel_size": 4}, "kernel_size: got 4, want odd sizes"),
        ({"kernel_size": (3, 0)}, r"kernel_size: got \(3, 0\), want an int of at least 1"),
        ({"kernel_size": True}, "kernel_size: got True"),
        ({"stride": 0}, "stride: got 0, want an int of at least 1"),
        ({"dilation": (1, 2, 3)}, "dilation: got"),
        ({"dilation": 1.5}, "dilation: got 1.5"),
    ],
)
def test_attentions_errors(change, message):
    arguments = dict.fromkeys(("query", "key", "value"), (1, 2, 4, 4, 3)) | {"kernel_size": 3}
    arguments |= change
    for name in ("query", "key", "value"):
        if isinstance(arguments[name], tuple):
            arguments[name] = torch.zeros(arguments[name])
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**arguments)


@pytest.mark.parametrize(
    ("weights", "value", "message"),
    [
        ((1, 2, 9, 4, 4), (4, 4, 4), r"value: got torch.float32 of shape \(4, 4, 4\), want"),
        ((1, 2, 8, 4, 4), (1, 4, 4, 4), r"weights: got .* \(1, 2, 8, 4, 4\), want .* taps 9, 4, 4"),
        ((2, 9, 4, 4), (1, 4, 4, 4), r"weights: got .* \(2, 9, 4, 4\), want"),
        ((1, 3, 9, 4, 4), (1, 4, 4, 4), "weights: got 3 groups, want a divisor of the 4 channels"),
        ((1, 0, 9, 4, 4), (1, 4, 4, 4), "weights: got 0 groups"),
        ((1, 2, 9, 4, 4), (1, 4, 4, 0), "value: got a map of 4×0, want at least 1×1"),
        ((1, 2, 9, 4, 4), torch.zeros(1, 4, 4, 4).double(), "weights: got torch.float32"),
    ],
)
def test_mixes_errors(weights, value, message):
    value = torch.zeros(value) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=message):
        neighborhood_mix(torch.zeros(weights), value, 3)
